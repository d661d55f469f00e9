//! Matrix products over slices, with strides: a safe door to the `gemm` crate.

use gemm::Parallelism;

/// A strided view of a matrix inside a slice.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `rows × cols`, consecutive rows `row_stride` apart, columns adjacent.
    ///
    /// # Panics
    /// If the view reaches past the slice: a bug in this crate.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let reach = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(reach <= data.len(), "view of {reach} values in a slice of {}", data.len());
        View { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        View {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `out = keep · out + scale · a · b`, `out` with rows `row_stride` apart. With `keep` = 0 the old
/// values are not read, so they may be anything. `threads` lets gemm use the rayon pool.
///
/// # Panics
/// If the shapes disagree: a bug in this crate.
pub fn product(
    out: &mut [f32],
    row_stride: usize,
    keep: f32,
    scale: f32,
    a: View,
    b: View,
    threads: bool,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(a.cols, b.rows, "inner dimensions");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * row_stride + n <= out.len(), "output too small");
    if k == 0 {
        for row in out.chunks_mut(row_stride).take(m) {
            row[..n].iter_mut().for_each(|x| *x = if keep == 0.0 { 0.0 } else { *x * keep });
        }
        return;
    }
    // SAFETY: every view was checked against its slice, and `out` just above; `out` is borrowed
    // mutably, so it cannot overlap the inputs.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            keep != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            if threads { Parallelism::Rayon(0) } else { Parallelism::None },
        );
    }
}
