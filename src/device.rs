//! Where tensors live: the processor, or NVIDIA cards by number; and the machine in words.
//!
//! Both forms of the module `cards` offer the same functions: how many cards there are, and one of
//! them opened.

use candle_core::Device;

use crate::error::{Error, Result};

#[cfg(not(feature = "cuda"))]
#[path = "device/disabled.rs"]
mod cards;
#[cfg(feature = "cuda")]
#[path = "device/enabled.rs"]
mod cards;
#[cfg(feature = "cuda")]
pub(crate) mod kernels;

/// What a device name asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// The processor.
    Cpu,
    /// These cards, by their number, each once.
    Cards(Vec<usize>),
    /// Every card there is.
    All,
}

impl Asked {
    /// Reads "cpu", "cuda" (card 0), "cuda:1", "cuda:0,2" or "cuda:all".
    ///
    /// ```
    /// use isopleth::device::Asked;
    /// assert_eq!(Asked::parse("cuda").unwrap(), Asked::Cards(vec![0]));
    /// assert_eq!(Asked::parse("cuda:2,0").unwrap(), Asked::Cards(vec![2, 0]));
    /// assert_eq!(Asked::parse("cuda:all").unwrap(), Asked::All);
    /// assert!(Asked::parse("cuda:1,1").is_err());
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for another name, a number that is none, or a card named twice.
    pub fn parse(name: &str) -> Result<Self> {
        let help = "use cpu, cuda, cuda:N, cuda:0,1 or cuda:all";
        match name {
            "cpu" => return Ok(Asked::Cpu),
            "cuda" => return Ok(Asked::Cards(vec![0])),
            "cuda:all" => return Ok(Asked::All),
            _ => {}
        }
        let Some(list) = name.strip_prefix("cuda:") else {
            return Err(Error::input(format!("there is no device `{name}`")).try_this(help));
        };
        let mut cards = Vec::new();
        for word in list.split(',') {
            let card: usize = word.trim().parse().map_err(|_| {
                Error::input(format!("`{word}` is not the number of a card"))
                    .fact("device", name)
                    .try_this(help)
            })?;
            if cards.contains(&card) {
                return Err(Error::input(format!("card {card} is named twice"))
                    .fact("device", name)
                    .try_this("name every card once"));
            }
            cards.push(card);
        }
        Ok(Asked::Cards(cards))
    }
}

/// The one device called `name`: "cpu", "cuda" (the first card) or "cuda:N".
///
/// # Errors
/// [`Error::Input`] for another name, several cards, a build without CUDA, or a card that cannot be
/// used: missing, too old for what was compiled, or with a driver too old.
pub fn open(name: &str) -> Result<Device> {
    match Asked::parse(name)? {
        Asked::Cpu => Ok(Device::Cpu),
        Asked::Cards(cards) if cards.len() == 1 => cards::open(cards[0]),
        _ => Err(Error::input("one device is needed here, and several are named")
            .fact("device", name)
            .try_this("name one: --device cuda:0")),
    }
}

/// Every device that `name` asks for, in the order named: as [`open`], and "cuda:0,1" or "cuda:all".
///
/// # Errors
/// As [`open`].
pub fn open_all(name: &str) -> Result<Vec<Device>> {
    let numbers = match Asked::parse(name)? {
        Asked::Cpu => return Ok(vec![Device::Cpu]),
        Asked::Cards(numbers) => numbers,
        Asked::All => match cards::count()? {
            0 => return Err(unusable("CUDA_ERROR_NO_DEVICE", 0, None)),
            count => (0..count).collect(),
        },
    };
    numbers.into_iter().map(cards::open).collect()
}

/// What was found for a device name that may be answered by the processor.
#[derive(Debug)]
pub struct Found {
    /// Where to compute: the cards asked for, or the processor alone.
    pub devices: Vec<Device>,
    /// Why it is the processor, where a card was asked for.
    pub without: Option<Error>,
}

/// As [`open_all`], save that "cuda" means a card where there is one: without CUDA, or without any
/// card or driver, it is the processor, with the reason. A card with a number is that card or an error.
///
/// # Errors
/// As [`open`]: a driver that is too old or a card that cannot be used is an error here too.
pub fn find(name: &str) -> Result<Found> {
    let found = |devices| Found { devices, without: None };
    match open_all(name) {
        Err(error) if name == "cuda" && is_absent(&error) => {
            Ok(Found { without: Some(error), ..found(vec![Device::Cpu]) })
        }
        devices => devices.map(found),
    }
}

/// Whether an error says that there is nothing that could be used.
fn is_absent(error: &Error) -> bool {
    let none = |(_, value): &(String, String)| value.contains("CUDA_ERROR_NO_DEVICE");
    error.to_string().contains("this build has no CUDA") || error.facts().iter().any(none)
}

/// Memory of a card, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What can still be had.
    pub free: usize,
    /// What it has.
    pub total: usize,
    /// The most that this process had in tensors; 0 where the driver does not say.
    pub peak: usize,
}

/// Memory of a card; nothing for the processor.
pub fn memory(device: &Device) -> Option<Memory> {
    cards::memory(device)
}

/// Multiply-adds and exponentials per ns of a card that does nothing else, in f32 and without
/// tensor cores, from its multiprocessors and clock: 128 and 16 for each in a cycle, as compute
/// capability 8.6 to 9.0 has (CUDA C++ Programming Guide, throughput of native arithmetic; 8.0 has
/// half the multiply-adds). Nothing for the processor.
pub fn rates(device: &Device) -> Option<[f64; 2]> {
    let (multiprocessors, gigahertz) = cards::speed(device)?;
    Some([128.0, 16.0].map(|each| each * multiprocessors * gigahertz))
}

/// Name, memory and compute capability of a card; nothing for the processor.
pub fn card(device: &Device) -> Option<String> {
    cards::describe(device)
}

/// Version of NVIDIA's driver, in the words of the system; nothing where it does not say.
pub fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/sys/module/nvidia/version").ok().or_else(|| {
        // NVRM version: NVIDIA UNIX … Kernel Module  580.65.06  Release Build …
        let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
        let numbered = |w: &&str| w.starts_with(|c: char| c.is_ascii_digit()) && w.contains('.');
        text.split_whitespace().find(numbered).map(String::from)
    })?;
    Some(text.trim().to_string())
}

/// Why card `number` of `count` cannot be used, from what CUDA said.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn unusable(reason: &str, number: usize, count: Option<usize>) -> Error {
    let has = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    let elsewhere = "or use --device cpu";
    if let Some(count) = count.filter(|count| *count > 0 && number >= *count) {
        let cards = if count == 1 { "one card".into() } else { format!("{count} cards") };
        return Error::input(format!("there is no card {number}"))
            .fact("this machine has", cards)
            .try_this(format!("name one from 0 to {}, {elsewhere}", count - 1));
    }
    let (what, help) = if has(&["CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE"]) {
        (
            "no CUDA device can be used: there is no card, or no driver",
            "look with nvidia-smi (and at CUDA_VISIBLE_DEVICES)",
        )
    } else if has(&[
        "SYSTEM_DRIVER_MISMATCH",
        "INSUFFICIENT_DRIVER",
        "UNSUPPORTED_PTX_VERSION",
        "COMPAT_NOT_SUPPORTED",
        "STUB_LIBRARY",
        "CALL_REQUIRES_NEWER_DRIVER",
    ]) {
        (
            "no CUDA device can be used: its driver is too old, or not the one of its kernel module",
            "install a driver of the 580 series or later (CUDA 13.0) and start the machine again",
        )
    } else if has(&["NO_BINARY_FOR_GPU", "INVALID_PTX"]) {
        (
            "this build has no kernels for the card",
            "rebuild with CUDA_COMPUTE_CAP set to the card's",
        )
    } else if has(&["OUT_OF_MEMORY"]) {
        ("the card has no memory left", "wait for what runs on it (nvidia-smi), use another card")
    } else if has(&["DEVICE_UNAVAILABLE", "DEVICES_UNAVAILABLE", "DEVICE_IN_USE"]) {
        ("the card is taken by another program", "wait for it (nvidia-smi), use another card")
    } else if has(&["CUBLAS", "cublas", "CURAND", "curand"]) {
        (
            "no CUDA device can be used: cuBLAS or cuRAND does not answer",
            "put the folder of libcublas.so.13 and libcurand.so.10 into LD_LIBRARY_PATH",
        )
    } else {
        ("no CUDA device can be used", "check the driver with nvidia-smi")
    };
    // What follows the first line is where in candle it happened.
    Error::input(what)
        .fact("card", number)
        .fact("reason", reason.lines().next().unwrap_or_default())
        .try_this(format!("{help}, {elsewhere}"))
}

/// A card whose compute capability is below the least that was compiled for.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn too_old(name: &str, capability: (i32, i32), least: i32) -> Option<Error> {
    let (major, minor) = capability;
    (major * 10 + minor < least).then(|| {
        Error::input("the card is older than this build serves")
            .fact("card", format!("{name}, compute capability {major}.{minor}"))
            .fact("needed", format!("{}.{} or later", least / 10, least % 10))
            .try_this("use another card, or --device cpu")
    })
}

/// The processor, in the words of the system.
pub fn processor() -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split(':').nth(1)?.trim().to_string())
    });
    model.unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// Processor and thread count.
pub fn describe() -> String {
    format!("{}, {} threads", processor(), rayon::current_num_threads())
}

/// Processor and thread count, and every card among `devices`: name, memory, compute capability.
pub fn describe_all(devices: &[Device]) -> String {
    let cards = devices.iter().filter_map(cards::describe);
    std::iter::once(describe()).chain(cards).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_are_read_or_refused() {
        assert_eq!(Asked::parse("cpu").unwrap(), Asked::Cpu);
        assert_eq!(Asked::parse("cuda:3").unwrap(), Asked::Cards(vec![3]));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:one", "cuda:0,", "cuda:0,0", "CUDA"] {
            let error = Asked::parse(bad).unwrap_err();
            assert!(error.help().is_some(), "{bad}: {error}");
        }
        let several = open("cuda:0,1").unwrap_err();
        assert!(several.to_string().contains("one device is needed"), "{several}");
        assert_eq!(open_all("cpu").unwrap().len(), 1);
    }

    /// "cuda" without a card is the processor, with the reason; a card by number is an error, and so
    /// is a card that is there and cannot be used.
    #[test]
    fn a_card_that_is_not_there_is_said_to_be_missing() {
        assert!(find("cpu").unwrap().without.is_none());
        if open("cuda").is_err_and(|e| is_absent(&e)) {
            let found = find("cuda").unwrap();
            assert!(found.devices.len() == 1 && found.devices[0].is_cpu());
            assert!(found.without.is_some_and(|reason| reason.help().is_some()));
            for name in ["cuda:0", "cuda:0,1", "cuda:all", "gpu"] {
                assert!(find(name).is_err(), "{name}");
            }
        }
        assert!(is_absent(&unusable("DriverError(CUDA_ERROR_NO_DEVICE, \"…\")", 0, None)));
        for reason in ["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_OUT_OF_MEMORY"] {
            assert!(!is_absent(&unusable(reason, 0, Some(1))), "{reason}");
        }
        assert_eq!([memory(&Device::Cpu).is_none(), rates(&Device::Cpu).is_none()], [true; 2]);
    }

    #[test]
    fn reasons_become_words() {
        for (reason, words) in [
            ("DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device\")", "no card"),
            ("DriverError(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, \"…\")", "driver is too old"),
            ("DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, \"…\")", "driver is too old"),
            ("DriverError(CUDA_ERROR_NO_BINARY_FOR_GPU, \"…\")", "no kernels for the card"),
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"…\")", "no memory left"),
            ("CublasError(CUBLAS_STATUS_NOT_INITIALIZED)", "cuBLAS or cuRAND"),
            ("something new", "no CUDA device can be used"),
        ] {
            let error = unusable(reason, 0, Some(1));
            assert!(error.to_string().contains(words), "{reason}: {error}");
            assert!(error.help().is_some_and(|help| help.contains("--device cpu")));
        }
        let missing = unusable("DriverError(CUDA_ERROR_INVALID_DEVICE, \"…\")", 5, Some(2));
        assert_eq!(missing.to_string(), "there is no card 5");
        assert_eq!(missing.facts()[0].1, "2 cards");
    }

    #[test]
    fn an_old_card_is_named_with_what_it_lacks() {
        let error = too_old("Tesla T4", (7, 5), 80).unwrap();
        assert!(error.facts()[0].1.contains("7.5") && error.facts()[1].1.contains("8.0"));
        assert!(too_old("H200", (9, 0), 80).is_none());
        assert!(too_old("B200", (10, 0), 90).is_none());
    }
}
