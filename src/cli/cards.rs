//! Where a command computes: `--device`, in words and on the record.

use candle_core::Device;

use super::{map::FITTED, note};
use crate::{
    attention::{Precision, Reading},
    device,
    error::Result,
    mapping::{plan::Bytes, record::DeviceNote},
};

/// Where the model computes.
#[derive(Debug, Clone, clap::Args)]
pub struct DeviceArgs {
    /// Where the model computes: cpu, cuda (a GPU where there is one), cuda:1, cuda:0,1 or cuda:all
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
}

/// The devices that a command computes on.
pub(super) struct Cards {
    pub devices: Vec<Device>,
    asked: String,
    /// Why it is not what was asked for.
    fallback: Option<String>,
    /// What a card does otherwise than asked.
    otherwise: Option<String>,
}

impl DeviceArgs {
    /// Opens what was asked for. "cuda" without a card is the processor, and says so at once.
    ///
    /// # Errors
    /// Those of [`device::find`].
    pub(super) fn open(&self, model: Option<&str>, reading: Reading) -> Result<Cards> {
        let cards = |devices, fallback, otherwise| {
            let asked = self.device.clone();
            Cards { devices, asked, fallback, otherwise }
        };
        if device::Asked::parse(&self.device)? != device::Asked::Cpu
            && model.is_some_and(|name| FITTED.contains(&name))
        {
            let why = "a Gaussian process computes on the processor";
            note(format!("note        --device {}: {why}", self.device));
            return Ok(cards(vec![Device::Cpu], Some(why.into()), None));
        }
        let found = device::find(&self.device)?;
        let Some(reason) = found.without else {
            let on_cards = found.devices.iter().any(Device::is_cuda);
            return Ok(cards(found.devices, None, otherwise(reading).filter(|_| on_cards)));
        };
        note(format!("note        {reason}: the processor computes instead"));
        Ok(cards(found.devices, Some(reason.to_string()), None))
    }
}

/// What cards do otherwise than asked: their kernel that leaves sites out is in f32 alone.
fn otherwise(reading: Reading) -> Option<String> {
    let rounded = reading.lose > 0.0 && reading.precision != Precision::F32;
    rounded.then(|| {
        let precision = reading.precision.name();
        format!("--precision {precision}: where --lose leaves sites out, a card computes in f32")
    })
}

impl Cards {
    /// For the run record, once all is done.
    pub fn record(&self) -> DeviceNote {
        let cards: Vec<String> = self.devices.iter().filter_map(device::card).collect();
        let driver = if cards.is_empty() { None } else { device::driver() };
        let peak = self.devices.iter().filter_map(device::memory).map(|m| Bytes(m.peak)).max();
        DeviceNote {
            asked: self.asked.clone(),
            used: if cards.is_empty() { vec![device::describe()] } else { cards },
            driver,
            fallback: self.fallback.clone(),
            card_memory_mib: peak.map(Bytes::mebibytes),
        }
    }

    /// What should be known beside the other warnings.
    pub fn warnings(&self, cut_to: Option<usize>) -> Vec<String> {
        let cut = cut_to.map(|targets| {
            format!("the card had no memory for more than {targets} targets at a time: slower")
        });
        let fallback =
            self.fallback.as_ref().map(|why| format!("--device {}: {why}; used cpu", self.asked));
        fallback.into_iter().chain(self.otherwise.clone()).chain(cut).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_bits_beside_lost_sites_are_told_of() {
        for (lose, precision, told) in [
            (0.0, Precision::F32, false),
            (1e-3, Precision::F32, false),
            (0.0, Precision::Bf16, false),
            (1e-3, Precision::Bf16, true),
            (1e-3, Precision::Tf32, true),
        ] {
            let said = otherwise(Reading { lose, precision });
            assert_eq!(said.is_some(), told, "{lose}, {precision:?}");
            assert!(said.is_none_or(|said| said.contains(precision.name())));
        }
        let otherwise = otherwise(Reading { lose: 1e-3, precision: Precision::Bf16 });
        let asked = "cuda".to_string();
        let cards = Cards { devices: vec![Device::Cpu], asked, fallback: None, otherwise };
        assert!(cards.warnings(None)[0].contains("a card computes in f32"));
    }
}
