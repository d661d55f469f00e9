//! Minimising a function of a few numbers without derivatives.
//!
//! Source: Nelder & Mead (1965), doi:10.1093/comjnl/7.4.308, with the usual coefficients.

/// The smallest value found near `start`, and where. Stops when the simplex is flat to `tolerance`
/// or after `limit` evaluations. `f` may return ∞ where it is undefined.
pub fn minimise(
    mut f: impl FnMut(&[f64]) -> f64,
    start: &[f64],
    step: f64,
    tolerance: f64,
    limit: usize,
) -> (Vec<f64>, f64) {
    let n = start.len();
    let mut simplex: Vec<(Vec<f64>, f64)> = (0..=n)
        .map(|i| {
            let mut x = start.to_vec();
            if i > 0 {
                x[i - 1] += step;
            }
            let value = f(&x);
            (x, value)
        })
        .collect();
    let mut calls = n + 1;
    loop {
        simplex.sort_by(|a, b| a.1.total_cmp(&b.1));
        if simplex[n].1 - simplex[0].1 < tolerance || calls >= limit {
            return simplex.swap_remove(0);
        }
        let centre: Vec<f64> = (0..n)
            .map(|d| simplex[..n].iter().map(|(x, _)| x[d]).sum::<f64>() / n as f64)
            .collect();
        let mut probe = |worst: &[f64], t: f64| {
            calls += 1;
            let x: Vec<f64> = (0..n).map(|d| centre[d] + t * (worst[d] - centre[d])).collect();
            let value = f(&x);
            (x, value)
        };
        let worst = simplex[n].0.clone();
        let reflected = probe(&worst, -1.0);
        simplex[n] = if reflected.1 < simplex[0].1 {
            let expanded = probe(&worst, -2.0);
            if expanded.1 < reflected.1 { expanded } else { reflected }
        } else if reflected.1 < simplex[n - 1].1 {
            reflected
        } else {
            let outside = reflected.1 < simplex[n].1;
            let contracted = probe(&worst, if outside { -0.5 } else { 0.5 });
            if contracted.1 < reflected.1.min(simplex[n].1) {
                contracted
            } else {
                let best = simplex[0].0.clone();
                for vertex in &mut simplex[1..] {
                    vertex.0 = vertex.0.iter().zip(&best).map(|(x, b)| 0.5 * (x + b)).collect();
                    vertex.1 = f(&vertex.0);
                    calls += 1;
                }
                continue;
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::minimise;

    #[test]
    fn finds_the_bottom_of_a_curved_valley() {
        let rosenbrock = |x: &[f64]| (1.0 - x[0]).powi(2) + 100.0 * (x[1] - x[0] * x[0]).powi(2);
        let (x, value) = minimise(rosenbrock, &[-1.2, 1.0], 0.5, 1e-14, 1000);
        assert!(value < 1e-10 && (x[0] - 1.0).abs() < 1e-4 && (x[1] - 1.0).abs() < 1e-4, "{x:?}");
    }

    #[test]
    fn walks_away_from_where_the_function_is_undefined() {
        let f = |x: &[f64]| {
            if x[0] <= 0.0 { f64::INFINITY } else { x[0] - x[0].ln() }
        };
        let (x, _) = minimise(f, &[0.05], -0.2, 1e-12, 500);
        assert!((x[0] - 1.0).abs() < 1e-4, "{x:?}");
    }
}
