//! Set convolution between scattered sites and a lattice, both ways, with its gradient.
//!
//! Source: Gordon et al. (2020), arXiv:1910.13556, eq. 4. Weights are Gaussian and so fall into a
//! factor for each axis; one that is below 3e-11 is left out, since no sum of f32 would notice.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, simd, slice};

/// A lattice of cells, `1 / per_unit` apart, that holds the origin or would if it were longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lattice {
    /// Cells in one model unit.
    pub per_unit: usize,
    /// Rows (second coordinate) and columns (first coordinate); one row on a line.
    pub cells: [usize; 2],
    /// Number of the first row and column, counted from the origin.
    pub first: [i64; 2],
}

impl Lattice {
    /// Cells in all.
    pub fn len(&self) -> usize {
        self.cells[0] * self.cells[1]
    }

    /// No cells at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Sums over sites at every cell: `Σₙ exp(−½ |u − sₙ|² / ℓ²) vₙ`.
///
/// # Shapes
/// `s` `[batch, site, dim]`, `values` `[batch, site, channel]`, `log_length` `[1]`: ln ℓ, model
/// units. Returns `[batch, row, column, channel]`. No gradient reaches `s`.
pub fn to_lattice(
    s: &Tensor,
    values: &Tensor,
    log_length: &Tensor,
    lattice: Lattice,
) -> Result<Tensor> {
    let (batch, sites, channels) = values.dims3()?;
    let [rows, columns] = lattice.cells;
    if applies(values) && sites > 0 {
        let (s, values) = (s.contiguous()?, values.contiguous()?);
        return s.apply_op3(&values, log_length, SetConv { lattice, to_lattice: true });
    }
    if sites == 0 {
        return Tensor::zeros((batch, rows, columns, channels), values.dtype(), values.device());
    }
    let across = weights(s, 0, log_length, lattice)?; // [batch, site, column]
    let each = values.unsqueeze(2)?.broadcast_mul(&across.unsqueeze(3)?)?;
    if s.dim(2)? == 1 {
        return each.sum(1)?.unsqueeze(1);
    }
    let along = weights(s, 1, log_length, lattice)?.transpose(1, 2)?.contiguous()?;
    along.matmul(&each.flatten_from(2)?)?.reshape((batch, rows, columns, channels))
}

/// Sums over cells at every site: `Σᵤ exp(−½ |u − sₙ|² / ℓ²) f(u)`.
///
/// # Shapes
/// `s` `[batch, site, dim]`, `field` `[batch, row, column, channel]`, `log_length` `[1]`: ln ℓ,
/// model units. Returns `[batch, site, channel]`. No gradient reaches `s`.
pub fn from_lattice(
    s: &Tensor,
    field: &Tensor,
    log_length: &Tensor,
    lattice: Lattice,
) -> Result<Tensor> {
    let (batch, rows, columns, channels) = field.dims4()?;
    let sites = s.dim(1)?;
    if sites == 0 {
        return Tensor::zeros((batch, 0, channels), field.dtype(), field.device());
    }
    if applies(field) {
        let (s, field) = (s.contiguous()?, field.contiguous()?);
        return s.apply_op3(&field, log_length, SetConv { lattice, to_lattice: false });
    }
    let across = weights(s, 0, log_length, lattice)?; // [batch, site, column]
    if s.dim(2)? == 1 {
        return across.matmul(&field.reshape((batch, columns, channels))?);
    }
    let along = weights(s, 1, log_length, lattice)?;
    let each = along.matmul(&field.reshape((batch, rows, columns * channels))?)?;
    let each = each.reshape((batch, sites, columns, channels))?;
    each.broadcast_mul(&across.unsqueeze(3)?)?.sum(2)
}

/// The factor of one axis: `[batch, site, cell]`.
fn weights(s: &Tensor, axis: usize, log_length: &Tensor, lattice: Lattice) -> Result<Tensor> {
    let d = 1 - axis;
    let per_unit = lattice.per_unit as f64;
    let cells: Vec<f64> =
        (0..lattice.cells[d]).map(|i| (lattice.first[d] + i as i64) as f64 / per_unit).collect();
    let cells = Tensor::new(cells, s.device())?.to_dtype(s.dtype())?;
    let apart = s.narrow(2, axis, 1)?.broadcast_sub(&cells.reshape((1, 1, ()))?)?;
    (apart.broadcast_div(&log_length.exp()?)?.sqr()? * -0.5)?.exp()
}

struct SetConv {
    lattice: Lattice,
    to_lattice: bool,
}

/// How many ℓ the weights reach: `exp(−½ 7²)` is 2e-11.
const REACH: f32 = 7.0;

/// The cells of one axis that a site weighs, and their weights.
#[derive(Default)]
struct Axis {
    start: usize,
    weight: Vec<f32>,
    /// `weight · d² / ℓ²`: what ln ℓ changes.
    slope: Vec<f32>,
}

impl Axis {
    /// `at` and `length` in cells, from the first.
    fn place(&mut self, at: f32, length: f32, cells: usize) {
        let low = (at - REACH * length).ceil().max(0.0);
        let high = (at + REACH * length).floor().min(cells as f32 - 1.0);
        self.start = low as usize;
        let count = if high >= low { (high - low) as usize + 1 } else { 0 };
        self.weight.resize(count, 0.0);
        self.slope.resize(count, 0.0);
        gaussian(at - low, 1.0 / length, &mut self.weight, &mut self.slope);
    }

    /// An axis that there is not.
    fn whole() -> Self {
        Axis { start: 0, weight: vec![1.0], slope: vec![0.0] }
    }
}

simd::vectorised! {
    /// Weights of the cells 0, 1, … for a site at `at`, with their slopes.
    pub fn gaussian(at: f32, inverse: f32, weight: &mut [f32], slope: &mut [f32]) {
        for (i, (weight, slope)) in weight.iter_mut().zip(slope).enumerate() {
            let z = (i as f32 - at) * inverse;
            *weight = simd::exp(-0.5 * z * z);
            *slope = z * z * *weight;
        }
    }
}

simd::vectorised! {
    /// `out += Σ along · across · field` over a window of `field` `[row, column, channel]`.
    pub fn gather(
        field: &[f32],
        columns: usize,
        corner: usize,
        along: &[f32],
        across: &[f32],
        out: &mut [f32],
    ) {
        let c = out.len();
        for (j, along) in along.iter().enumerate() {
            let row = &field[(corner + j * columns) * c..][..across.len() * c];
            for (across, cell) in across.iter().zip(row.chunks_exact(c)) {
                let w = along * across;
                for (out, x) in out.iter_mut().zip(cell) {
                    *out = w.mul_add(*x, *out);
                }
            }
        }
    }
}

simd::vectorised! {
    /// `field += along · across · values` over a window of `field` `[row, column, channel]`.
    pub fn scatter(
        values: &[f32],
        columns: usize,
        corner: usize,
        along: &[f32],
        across: &[f32],
        field: &mut [f32],
    ) {
        let c = values.len();
        for (j, along) in along.iter().enumerate() {
            let row = &mut field[(corner + j * columns) * c..][..across.len() * c];
            for (across, cell) in across.iter().zip(row.chunks_exact_mut(c)) {
                let w = along * across;
                for (cell, x) in cell.iter_mut().zip(values) {
                    *cell = w.mul_add(*x, *cell);
                }
            }
        }
    }
}

/// Sites that one thread reads one after another.
const SITES: usize = 64;

/// One row of a batch.
struct Row<'a> {
    lattice: Lattice,
    /// ℓ, model units.
    length: f32,
    dim: usize,
    channels: usize,
    /// `[site, dim]`.
    s: &'a [f32],
}

impl Row<'_> {
    /// `each(site, along, across)` for the sites `start … end`.
    fn visit(&self, start: usize, end: usize, mut each: impl FnMut(usize, &Axis, &Axis)) {
        let per_unit = self.lattice.per_unit as f32;
        let length = self.length * per_unit;
        let at = |site: usize, axis: usize| {
            self.s[site * self.dim + axis] * per_unit - self.lattice.first[1 - axis] as f32
        };
        let (mut along, mut across) = (Axis::whole(), Axis::default());
        for site in start..end {
            across.place(at(site, 0), length, self.lattice.cells[1]);
            if self.dim > 1 {
                along.place(at(site, 1), length, self.lattice.cells[0]);
            }
            if !along.weight.is_empty() && !across.weight.is_empty() {
                each(site, &along, &across);
            }
        }
    }

    fn corner(&self, along: &Axis, across: &Axis) -> usize {
        along.start * self.lattice.cells[1] + across.start
    }

    fn sites(&self) -> usize {
        self.s.len() / self.dim
    }

    fn scatter(&self, values: &[f32], field: &mut [f32]) {
        self.visit(0, self.sites(), |site, along, across| {
            let values = &values[site * self.channels..][..self.channels];
            // Sites that are not observed.
            if values.iter().any(|v| *v != 0.0) {
                let corner = self.corner(along, across);
                let columns = self.lattice.cells[1];
                scatter(values, columns, corner, &along.weight, &across.weight, field);
            }
        });
    }

    fn gather(&self, field: &[f32], out: &mut [f32]) {
        let block = SITES * self.channels;
        out.par_chunks_mut(block).enumerate().for_each(|(i, out)| {
            let (start, count) = (i * SITES, out.len() / self.channels);
            self.visit(start, start + count, |site, along, across| {
                let corner = self.corner(along, across);
                let out = &mut out[(site - start) * self.channels..][..self.channels];
                let columns = self.lattice.cells[1];
                gather(field, columns, corner, &along.weight, &across.weight, out);
            });
        });
    }

    /// What `Σ values · gather(field)` gains with ln ℓ.
    fn slope(&self, field: &[f32], values: &[f32]) -> f64 {
        let (mut total, mut sum) = (0.0f64, vec![0.0f32; self.channels]);
        let columns = self.lattice.cells[1];
        self.visit(0, self.sites(), |site, along, across| {
            let values = &values[site * self.channels..][..self.channels];
            if values.iter().all(|v| *v == 0.0) {
                return;
            }
            sum.fill(0.0);
            let corner = self.corner(along, across);
            gather(field, columns, corner, &along.weight, &across.slope, &mut sum);
            if self.dim > 1 {
                gather(field, columns, corner, &along.slope, &across.weight, &mut sum);
            }
            total +=
                sum.iter().zip(values).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        });
        total
    }
}

impl SetConv {
    /// The rows of a batch.
    fn rows<'a>(
        &self,
        s: &'a [f32],
        shape: &Shape,
        log: f32,
        channels: usize,
    ) -> Result<Vec<Row<'a>>> {
        let (batch, sites, dim) = shape.dims3()?;
        let row = |i: usize| Row {
            lattice: self.lattice,
            length: log.exp(),
            dim,
            channels,
            s: &s[i * sites * dim..(i + 1) * sites * dim],
        };
        Ok((0..batch).map(row).collect())
    }
}

impl CustomOp3 for SetConv {
    fn name(&self) -> &'static str {
        "set-conv"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (s, values, log) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?[0]);
        let channels = *l2.dims().last().expect("channels");
        let rows = self.rows(s, l1.shape(), log, channels)?;
        let (batch, sites) = (rows.len(), l1.dims()[1]);
        let [tall, wide] = self.lattice.cells;
        let shape = match self.to_lattice {
            true => Shape::from((batch, tall, wide, channels)),
            false => Shape::from((batch, sites, channels)),
        };
        let mut out = vec![0.0; shape.elem_count()];
        let (from, to) = (values.len() / batch, out.len() / batch);
        rows.par_iter().zip(values.par_chunks(from).zip(out.par_chunks_mut(to))).for_each(
            |(row, (values, out))| match self.to_lattice {
                true => row.scatter(values, out),
                false => row.gather(values, out),
            },
        );
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(
        &self,
        s: &Tensor,
        values: &Tensor,
        log_length: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = &grad.contiguous()?;
        let (ss, vs, gs) = (Host::of(s)?, Host::of(values)?, Host::of(grad)?);
        let (vs, gs): (&[f32], &[f32]) = (&vs, &gs);
        let log = Host::of(log_length)?[0];
        let channels = *values.dims().last().expect("channels");
        let rows = self.rows(&ss, s.shape(), log, channels)?;
        let batch = rows.len();
        let (from, to) = (vs.len() / batch, gs.len() / batch);
        let asked = values.track_op() || values.is_variable();
        let mut dvalues = vec![0.0; vs.len()];
        let slopes: Vec<f64> = rows
            .par_iter()
            .zip(vs.par_chunks(from).zip(gs.par_chunks(to)).zip(dvalues.par_chunks_mut(from)))
            .map(|(row, ((values, g), dvalues))| match self.to_lattice {
                true => {
                    if asked {
                        row.gather(g, dvalues);
                    }
                    row.slope(g, values)
                }
                false => {
                    if asked {
                        row.scatter(g, dvalues);
                    }
                    row.slope(values, g)
                }
            })
            .collect();
        let slope = slopes.iter().sum::<f64>() as f32;
        let dvalues = asked.then(|| Tensor::from_vec(dvalues, values.shape(), s.device()));
        let dlog = Tensor::from_vec(vec![slope], log_length.shape(), s.device())?;
        Ok((None, dvalues.transpose()?, Some(dlog)))
    }
}
