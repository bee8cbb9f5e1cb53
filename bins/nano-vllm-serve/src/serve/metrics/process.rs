//! What the process takes, under the names that Prometheus' client libraries give it. Nothing where there is no `/proc`.

use std::fmt::Error;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// `USER_HZ`, which is what Linux shows times in, whatever its own clock.
const TICKS_PER_SECOND: f64 = 100.0;

const STAT: &str = "/proc/self/stat";

/// Reads `/proc` when the metrics are asked for.
#[derive(Debug)]
pub(super) struct Process;

/// Empty where there is no such file.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The value of a line `name: value ...` of `text`.
fn field(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

impl Process {
    /// `stat` is that of the process.
    fn gauges(stat: &str) -> Vec<(&'static str, &'static str, f64)> {
        let [status, limits, system] =
            ["/proc/self/status", "/proc/self/limits", "/proc/stat"].map(read);
        let bytes = |name| field(&status, name).map(|kib| kib * 1024.0);
        let start = field(&system, "btime")
            .zip(after_name(stat, 22))
            .map(|(boot, ticks)| boot + ticks / TICKS_PER_SECOND);
        let files = fs::read_dir("/proc/self/fd").ok();
        let all = [
            (
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
                bytes("VmRSS:"),
            ),
            (
                "process_virtual_memory_bytes",
                "Virtual memory size in bytes",
                bytes("VmSize:"),
            ),
            (
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds",
                start,
            ),
            (
                "process_open_fds",
                "Number of open file descriptors",
                files.map(|files| files.count() as f64),
            ),
            (
                "process_max_fds",
                "Maximum number of open file descriptors",
                field(&limits, "Max open files"),
            ),
        ];
        all.into_iter()
            .filter_map(|(name, help, value)| Some((name, help, value?)))
            .collect()
    }

    /// Seconds of processor time.
    fn cpu(stat: &str) -> Option<f64> {
        Some((after_name(stat, 14)? + after_name(stat, 15)?) / TICKS_PER_SECOND)
    }
}

/// A field of `/proc/PID/stat` by its number in proc(5). The second, the program's name, may hold anything.
fn after_name(stat: &str, number: usize) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split_whitespace().nth(number - 3)?.parse().ok()
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let stat = read(STAT);
        for (name, help, value) in Self::gauges(&stat) {
            let gauge = ConstGauge::new(value);
            let kind = MetricType::Gauge;
            gauge.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        if let Some(seconds) = Self::cpu(&stat) {
            let counter = ConstCounter::new(seconds);
            let help = "Total user and system CPU time spent in seconds";
            let kind = MetricType::Counter;
            let name = "process_cpu_seconds";
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name_and_by_number() {
        let limits = "Limit  Soft  Hard\nMax open files            1024      4096   files\n";
        assert_eq!(field(limits, "Max open files"), Some(1024.0));
        assert_eq!(field(limits, "Max processes"), None);
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 777 1 2";
        assert_eq!(after_name(stat, 14), Some(250.0));
        assert_eq!(after_name(stat, 15), Some(50.0));
        assert_eq!(after_name(stat, 22), Some(777.0));
        assert_eq!(after_name("", 14), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_there() {
        let stat = read(STAT);
        let gauges = Process::gauges(&stat);
        let value = |name| {
            gauges
                .iter()
                .find(|gauge| gauge.0 == name)
                .map(|gauge| gauge.2)
        };
        assert!(value("process_resident_memory_bytes").unwrap() > 1e5);
        assert!(value("process_virtual_memory_bytes") > value("process_resident_memory_bytes"));
        assert!(value("process_open_fds").unwrap() >= 3.0);
        let age = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_secs_f64()
            - value("process_start_time_seconds").unwrap();
        assert!((-2.0..86_400.0).contains(&age), "{age} s old");
        assert!(Process::cpu(&stat).is_some());
    }
}
