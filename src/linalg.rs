//! Cholesky factors in f64, with the jitter they needed; and extreme singular values.
//!
//! Source: Golub & Van Loan (2013), section 4.2; the arithmetic is `faer`'s. Everything runs on one
//! thread, so that the number of threads can never change a digit: parallelism is over tasks.

use faer::{
    Mat, MatRef, Par,
    diag::Diag,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch},
        svd::{ComputeSvdVectors, svd, svd_scratch},
        triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place},
    },
};

use crate::error::{Error, Result};

/// What may be added to the diagonal, in units of its mean: nothing first.
pub const JITTER: [f64; 8] = [0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4];

/// The lower factor L of a covariance: `L Lᵀ = matrix + jitter · mean diagonal · I`.
///
/// ```
/// let factor = isopleth::linalg::lower(vec![4.0, 2.0, 2.0, 3.0], 2)?;
/// assert_eq!(factor.colour(&[1.0, 0.0]), vec![2.0, 1.0]);
/// assert!((factor.log_det() - 8f64.ln()).abs() < 1e-12);
/// assert_eq!(factor.jitter, 0.0);
/// # Ok::<(), isopleth::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Cholesky {
    lower: Mat<f64>,
    /// The rung of [`JITTER`] that was needed, in units of the mean diagonal.
    pub jitter: f64,
}

/// Factors a row-major `[n, n]` covariance. Only its lower triangle is read.
///
/// # Errors
/// [`Error::Axis`] if `matrix` does not hold n² numbers; else as [`Cholesky::factor`].
pub fn lower(matrix: Vec<f64>, n: usize) -> Result<Cholesky> {
    if matrix.len() != n * n {
        return Err(Error::axis(
            "numbers in a square matrix",
            matrix.len().to_string(),
            (n * n).to_string(),
        ));
    }
    Cholesky::factor(Mat::from_fn(n, n, |i, j| matrix[i * n + j]))
}

impl Cholesky {
    /// Factors a covariance `[n, n]`, climbing the ladder [`JITTER`] until it succeeds. Only the
    /// lower triangle is read.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`] from the top of the ladder, or if an entry is not finite.
    pub fn factor(matrix: Mat<f64>) -> Result<Self> {
        let n = matrix.nrows();
        let mean = (0..n).map(|i| matrix[(i, i)]).sum::<f64>() / n.max(1) as f64;
        for jitter in JITTER {
            let mut lower = matrix.clone();
            for i in 0..n {
                lower[(i, i)] += jitter * mean;
            }
            let memory = cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
            let factored = cholesky_in_place(
                lower.as_mut(),
                Default::default(),
                Par::Seq,
                MemStack::new(&mut MemBuffer::new(memory)),
                Default::default(),
            );
            // A pivot that is only rounding passes the sign test half of the time: reject it too.
            let least = f64::EPSILON * n as f64 * mean;
            if factored.is_ok() && (0..n).all(|i| lower[(i, i)] * lower[(i, i)] > least) {
                for j in 1..n {
                    for i in 0..j {
                        lower[(i, j)] = 0.0;
                    }
                }
                return Ok(Cholesky { lower, jitter });
            }
        }
        Err(Error::NotPositiveDefinite { size: n, jitter: JITTER[JITTER.len() - 1] })
    }

    /// Rows of the factor.
    pub fn len(&self) -> usize {
        self.lower.nrows()
    }

    /// No rows at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// L, `[n, n]`, zero above the diagonal.
    pub fn lower(&self) -> MatRef<'_, f64> {
        self.lower.as_ref()
    }

    /// Logarithm of the determinant of the factored matrix.
    pub fn log_det(&self) -> f64 {
        2.0 * (0..self.len()).map(|i| self.lower[(i, i)].ln()).sum::<f64>()
    }

    /// `L z` `[n]`: white noise gets the covariance that was factored.
    pub fn colour(&self, z: &[f64]) -> Vec<f64> {
        assert_eq!(z.len(), self.len(), "one normal per row");
        let mut out = vec![0.0; z.len()];
        // Column after column of the triangle: half of what a product with all of L reads.
        for (j, z) in z.iter().enumerate() {
            let column = &self.lower.col_as_slice(j)[j..];
            out[j..].iter_mut().zip(column).for_each(|(out, l)| *out += l * z);
        }
        out
    }

    /// `L⁻¹ B`, in place of `b` `[n, columns]`: the inverse of [`Cholesky::colour`].
    pub fn whiten(&self, b: &mut Mat<f64>) {
        solve_lower_triangular_in_place(self.lower(), b.as_mut(), Par::Seq);
    }

    /// `(L Lᵀ)⁻¹ b` `[n]`.
    pub fn solve(&self, b: &[f64]) -> Vec<f64> {
        let mut x = column(b);
        self.whiten(&mut x);
        solve_upper_triangular_in_place(self.lower().transpose(), x.as_mut(), Par::Seq);
        x.col_as_slice(0).to_vec()
    }
}

/// A singular value with its unit vectors: `value = leftᵀ A right`.
#[derive(Debug, Clone)]
pub struct Singular {
    /// How much the matrix stretches `right`.
    pub value: f64,
    /// `[rows]`.
    pub left: Vec<f64>,
    /// `[columns]`.
    pub right: Vec<f64>,
}

/// The largest and the smallest of the min(rows, columns) singular values of a row-major matrix.
///
/// ```
/// let [most, least] = isopleth::linalg::extremes(&[3.0, 0.0, 0.0, 0.0, -2.0, 0.0], 2, 3)?;
/// assert!((most.value - 3.0).abs() < 1e-12 && (least.value - 2.0).abs() < 1e-12);
/// assert!((least.left[1] * least.right[1] + 1.0).abs() < 1e-12);
/// # Ok::<(), isopleth::Error>(())
/// ```
///
/// # Errors
/// [`Error::Axis`] if `matrix` does not hold rows · columns numbers, or none;
/// [`Error::Input`] if a number is not finite.
pub fn extremes(matrix: &[f64], rows: usize, columns: usize) -> Result<[Singular; 2]> {
    let size = rows.min(columns);
    if matrix.len() != rows * columns || size == 0 {
        let expected = format!("{rows} rows of {columns}");
        return Err(Error::axis("numbers in a matrix", matrix.len().to_string(), expected));
    }
    let unsound = || Error::input("a matrix has no singular values: a number is not finite");
    if matrix.iter().any(|x| !x.is_finite()) {
        return Err(unsound());
    }
    let a = Mat::from_fn(rows, columns, |i, j| matrix[i * columns + j]);
    let (mut u, mut v) = (Mat::zeros(rows, size), Mat::zeros(columns, size));
    let mut s = Diag::zeros(size);
    let thin = ComputeSvdVectors::Thin;
    let memory = svd_scratch::<f64>(rows, columns, thin, thin, Par::Seq, Default::default());
    svd(
        a.as_ref(),
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(memory)),
        Default::default(),
    )
    .map_err(|_| unsound())?;
    let values = s.column_vector();
    let one = |i: usize| Singular {
        value: values[i],
        left: u.col_as_slice(i).to_vec(),
        right: v.col_as_slice(i).to_vec(),
    };
    Ok([one(0), one(size - 1)])
}

fn column(values: &[f64]) -> Mat<f64> {
    Mat::from_fn(values.len(), 1, |i, _| values[i])
}
