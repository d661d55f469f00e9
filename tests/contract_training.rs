//! Contract tests of training: layers as devices are told them, the optimiser on a card, who draws.

#[path = "contract/covariate_network.rs"]
mod covariate_network;
#[path = "contract/cuda_train.rs"]
mod cuda_train;
#[path = "contract/layers.rs"]
mod layers;
#[path = "contract/training.rs"]
mod training;
#[path = "contract/trust.rs"]
mod trust;
