//! What the system says about this process: processor time and peak memory.

use std::fs;

use super::plan;

/// Processor time of all threads since the start, in seconds and steps of 10 ms; none where the
/// system has no /proc.
pub fn cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in brackets, may hold spaces; user and system ticks are the 12th and 13th after it.
    let after = &stat[stat.rfind(')')? + 1..];
    let ticks: Vec<f64> =
        after.split_whitespace().skip(11).take(2).filter_map(|t| t.parse().ok()).collect();
    (ticks.len() == 2).then(|| ticks.iter().sum::<f64>() / 100.0)
}

/// The most memory that this process ever held, MiB; none where the system has no /proc.
pub fn peak_rss_mib() -> Option<f64> {
    plan::usage().map(|usage| usage.peak.mebibytes())
}

/// Makes [`peak_rss_mib`] the most that is held from now on. Whether the system does that: Linux, where
/// it is allowed.
pub fn forget_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn time_and_memory_are_seen_to_be_used() {
        let (cpu, memory) = (cpu_seconds().unwrap(), peak_rss_mib().unwrap());
        let held = vec![1u8; 200 << 20];
        let start = std::time::Instant::now();
        let mut sum = 0u64;
        while start.elapsed().as_millis() < 100 {
            sum = std::hint::black_box(held.iter().step_by(4096).map(|b| u64::from(*b)).sum());
        }
        assert!(sum > 0);
        assert!(cpu_seconds().unwrap() > cpu, "no time passed");
        assert!(peak_rss_mib().unwrap() > memory.min(100.0) + 99.0, "no memory was held");
    }
}
