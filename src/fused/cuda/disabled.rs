//! Without the feature `cuda`: no card, no kernel.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Device, Error, Result, Storage, Tensor, Var, backprop::GradStore};

use super::News;
use crate::fused::layers::{Act, Into, Machine};

/// No card.
pub struct Card(std::convert::Infallible);

impl Card {
    /// Nothing.
    pub fn of(_: &Tensor) -> Option<Self> {
        None
    }

    /// Nothing.
    pub fn places(_: &[&Tensor]) -> Into<Self> {
        Into::Graph
    }
}

impl Machine for Card {
    type Sums = ();
    fn sums(&self, _: usize) -> Result<()> {
        match self.0 {}
    }
    fn taken(&self, (): ()) -> Result<Storage> {
        match self.0 {}
    }
    fn product(&self, _: &Tensor, _: &Tensor) -> Result<Storage> {
        match self.0 {}
    }
    fn product_back(&self, _: &Tensor, _: &Tensor) -> Result<Storage> {
        match self.0 {}
    }
    fn product_weights(&self, _: &Tensor, _: &Tensor, (): &(), _: usize) -> Result<()> {
        match self.0 {}
    }
    fn epilogue(
        &self,
        _: Storage,
        _: &Tensor,
        _: Option<&Tensor>,
        _: Act,
    ) -> Result<(Option<Storage>, Storage)> {
        match self.0 {}
    }
    fn activate(&self, _: &Tensor, _: Act) -> Result<Storage> {
        match self.0 {}
    }
    fn add(&self, _: &Tensor, _: &Tensor) -> Result<Storage> {
        match self.0 {}
    }
    fn norm(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Storage> {
        match self.0 {}
    }
    fn norm_back(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: Option<&Tensor>,
        (): &(),
        _: [usize; 2],
    ) -> Result<Storage> {
        match self.0 {}
    }
    fn slopes(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: Act,
        _: Option<(&(), usize)>,
    ) -> Result<Option<Storage>> {
        match self.0 {}
    }
}

/// Nothing.
pub fn constrain(_: &Tensor, _: [&Tensor; 3]) -> Option<Result<Tensor>> {
    None
}

/// Only the work.
pub fn collecting<T>(_: Option<&Arc<Resident>>, work: impl FnOnce() -> T) -> T {
    work()
}

/// No cards that could add up among themselves.
pub struct Ring(std::convert::Infallible);

impl Ring {
    /// Nothing.
    pub fn new(_: &[Arc<Resident>]) -> Option<Self> {
        None
    }

    /// As the form with cards.
    pub fn sum(&self, _: &[Arc<Resident>]) -> Result<()> {
        match self.0 {}
    }
}

/// No optimiser on a card.
pub struct Resident(std::convert::Infallible);

impl Resident {
    /// An error that says so.
    pub fn new(_: &Device, _: &BTreeMap<String, Var>, _: bool) -> Result<Self> {
        Err(Error::NotCompiledWithCudaSupport)
    }

    /// As the form with a card.
    pub fn gather(&self, _: Option<&GradStore>, _: &Tensor) -> Result<Vec<usize>> {
        match self.0 {}
    }

    /// As the form with a card.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        match self.0 {}
    }

    /// As the form with a card.
    pub fn replace(&self, _: &[f32]) -> Result<()> {
        match self.0 {}
    }

    /// As the form with a card.
    pub fn update(&self, _: u64, _: f64, _: [f32; 5]) -> Result<()> {
        match self.0 {}
    }

    /// As the form with a card.
    pub fn news(&self) -> Result<News> {
        match self.0 {}
    }

    /// As the form with a card.
    pub fn kept(&self) -> Result<[Vec<Vec<f32>>; 3]> {
        match self.0 {}
    }

    /// As the form with a card.
    pub fn set(&self, _: [Vec<&[f32]>; 3]) -> Result<()> {
        match self.0 {}
    }
}
