//! Where a command computes: `--device`, in words and on the record.

use candle_core::Device;

use super::note;
use crate::{
    attention::Reading,
    device,
    error::{Error, Result},
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
}

impl DeviceArgs {
    /// Opens what was asked for. "cuda" without a card is the processor, and says so at once.
    ///
    /// # Errors
    /// Those of [`device::find`], and [`Error::Input`] for what a card cannot do.
    pub(super) fn open(&self, model: Option<&str>, reading: Reading) -> Result<Cards> {
        let cards = |devices, fallback| Cards { devices, asked: self.device.clone(), fallback };
        if device::Asked::parse(&self.device)? != device::Asked::Cpu
            && model.is_some_and(|name| ["gp", "vecchia"].contains(&name))
        {
            let why = "a Gaussian process computes on the processor";
            note(format!("note        --device {}: {why}", self.device));
            return Ok(cards(vec![Device::Cpu], Some(why.into())));
        }
        let found = device::find(&self.device)?;
        let Some(reason) = found.without else {
            if !found.devices.iter().all(Device::is_cpu) && reading.lose > 0.0 {
                return Err(Error::input("a card leaves out no site for being faint")
                    .fact("--device", &self.device)
                    .try_this("leave --lose out, or use --device cpu"));
            }
            return Ok(cards(found.devices, None));
        };
        note(format!("note        {reason}: the processor computes instead"));
        Ok(cards(found.devices, Some(reason.to_string())))
    }
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
        fallback.into_iter().chain(cut).collect()
    }
}
