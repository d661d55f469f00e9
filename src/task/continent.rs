//! A survey of a continent: dense cities, a thin country, and oceans where nobody lives.
//!
//! Source: cities by rank after Zipf (1949), with densities that fall off exponentially from their
//! centres (Clark 1951, doi:10.2307/2981088).

use crate::{
    error::Result,
    kernel::{Matern, Metric, Smoothness},
    prior::lattice::Lattice,
    rng::Stream,
};

/// Nodes along a side of the lattice that the coast is drawn on.
const NODES: usize = 256;
/// Share of the square that is land.
const LAND: f64 = 0.55;
/// Cities, and the radius of the largest, in half-sides of the square.
const CITIES: usize = 150;
const RADIUS: f64 = 0.04;
/// Share of sites that stand in cities.
const URBAN: f64 = 0.75;

/// A continent in the square [−1, 1]².
#[derive(Debug)]
pub struct Continent {
    /// How high the ground is above the sea, at the nodes.
    height: Vec<f64>,
    /// Centre and radius of each city, the largest first.
    cities: Vec<([f64; 2], f64)>,
    /// Running sum of their people, 1 at the end.
    people: Vec<f64>,
}

impl Continent {
    /// Draws coast and cities.
    ///
    /// # Errors
    /// Those of drawing on a lattice, which its covariance does not give cause for.
    pub fn draw(rng: &mut Stream) -> Result<Self> {
        let kernel = Matern {
            smoothness: Smoothness::FiveHalves,
            length_scale: 0.35,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let step = 2.0 / (NODES - 1) as f64;
        let [mut height, _] = Lattice::new(&kernel, [NODES, NODES], [step, step])?.draw(rng);
        let mut sorted = height.clone();
        sorted.sort_by(f64::total_cmp);
        let sea = sorted[((1.0 - LAND) * sorted.len() as f64) as usize];
        height.iter_mut().for_each(|h| *h -= sea);
        let mut continent = Continent { height, cities: Vec::new(), people: Vec::new() };
        let mut total = 0.0;
        for rank in 1..=CITIES {
            let size = 1.0 / rank as f64;
            let centre = continent.anywhere(rng);
            continent.cities.push((centre, RADIUS * size.sqrt()));
            total += size;
            continent.people.push(total);
        }
        continent.people.iter_mut().for_each(|p| *p /= total);
        Ok(continent)
    }

    /// Whether a place is on land.
    pub fn is_land(&self, [x, y]: [f64; 2]) -> bool {
        let axis = |v: f64| {
            let place = (0.5 * (v + 1.0)).clamp(0.0, 1.0) * (NODES - 1) as f64;
            let low = (place as usize).min(NODES - 2);
            (low, place - low as f64)
        };
        let ((c, u), (r, v)) = (axis(x), axis(y));
        let at = |r: usize, c: usize| self.height[r * NODES + c];
        let along = |r: usize| at(r, c) * (1.0 - u) + at(r, c + 1) * u;
        x.abs() <= 1.0 && y.abs() <= 1.0 && along(r) * (1.0 - v) + along(r + 1) * v >= 0.0
    }

    /// A place on land, all of which are equally likely.
    pub fn anywhere(&self, rng: &mut Stream) -> [f64; 2] {
        loop {
            let place = [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)];
            if self.is_land(place) {
                return place;
            }
        }
    }

    /// Where `n` people live who are surveyed: three in four in cities.
    pub fn survey(&self, n: usize, rng: &mut Stream) -> Vec<[f64; 2]> {
        (0..n).map(|_| self.person(rng)).collect()
    }

    fn person(&self, rng: &mut Stream) -> [f64; 2] {
        if rng.unit() >= URBAN {
            return self.anywhere(rng);
        }
        loop {
            let share = rng.unit();
            let city = self.people.partition_point(|p| *p < share).min(CITIES - 1);
            let ([x, y], radius) = self.cities[city];
            // A density that falls off exponentially in the plane: its distances are gamma of shape 2.
            let (r, turn) = (radius * rng.gamma(2.0), rng.uniform(0.0, std::f64::consts::TAU));
            let place = [x + r * turn.cos(), y + r * turn.sin()];
            if self.is_land(place) {
                return place;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_lives_in_the_ocean_and_most_in_cities() {
        let draw = |seed| Continent::draw(&mut Stream::new(seed, "continent", 0)).unwrap();
        let continent = draw(4);
        const N: usize = 4000;
        let survey = continent.survey(N, &mut Stream::new(4, "survey", 0));
        assert_eq!(survey.len(), N);
        assert!(survey.iter().all(|p| continent.is_land(*p)));
        assert_eq!(draw(4).survey(9, &mut Stream::new(4, "survey", 0)), survey[..9]);

        let mut rng = Stream::new(9, "square", 0);
        let land =
            (0..N).filter(|_| continent.is_land([rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]));
        let share = land.count() as f64 / N as f64;
        assert!((share - LAND).abs() < 0.04, "{share}");
        assert!(!continent.is_land([1.1, 0.0]) && !continent.is_land([0.0, f64::NAN]));

        // A hundredth of the square holds ten times its share of people, and half of it holds none.
        let mut cells = vec![0usize; 900];
        let cell = |v: f64| ((0.5 * (v + 1.0) * 30.0) as usize).min(29);
        survey.iter().for_each(|p| cells[30 * cell(p[1]) + cell(p[0])] += 1);
        cells.sort_unstable();
        assert!(cells[891..].iter().sum::<usize>() > N / 10, "{:?}", &cells[891..]);
        assert!(cells[..270].iter().sum::<usize>() < N / 100);
    }
}
