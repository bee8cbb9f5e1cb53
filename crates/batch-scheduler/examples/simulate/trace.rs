//! Workloads: from a file, or drawn from distributions like those of chat services.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// One request of a workload.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Seconds from the start.
    pub arrival: f64,
    pub prompt: usize,
    pub output: u32,
    /// Tenant for the fair policy; also its priority.
    pub class: u64,
    /// Leading tokens of the prompt that all requests of the class share.
    pub shared: usize,
}

/// Poisson arrivals, log-normal lengths, three classes: the first sends as much as both others
/// together, and each has a system prompt of its own.
pub fn generate(requests: usize, rate: f64, seed: u64) -> Vec<Arrival> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut now = 0.0;
    (0..requests)
        .map(|_| {
            now -= (1.0 - rng.random::<f64>()).ln() / rate;
            let class = [0, 0, 1, 2][rng.random_range(0..4)];
            let shared = [64, 256, 512][class as usize];
            Arrival {
                arrival: now,
                prompt: shared + log_normal(&mut rng, 150.0, 1.0, 2048),
                output: log_normal(&mut rng, 120.0, 0.8, 1024) as u32,
                class,
                shared,
            }
        })
        .collect()
}

/// A length with the given median, at least 1 and at most `max`.
fn log_normal(rng: &mut StdRng, median: f64, sigma: f64, max: usize) -> usize {
    // The sum of twelve uniform numbers has variance 1.
    let normal = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
    ((median * (sigma * normal).exp()) as usize).clamp(1, max)
}

/// Reads a trace; see the front of this example for the format.
pub fn read(path: &str) -> Result<Vec<Arrival>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))?;
    let mut trace = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let arrival = parse(line).map_err(|e| format!("{path}, line {}: {e}", i + 1))?;
        trace.push(arrival);
    }
    trace.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
    Ok(trace)
}

fn parse(line: &str) -> Result<Arrival, String> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    if !(3..=5).contains(&fields.len()) {
        return Err(format!(
            "{} fields where 3 to 5 were expected",
            fields.len()
        ));
    }
    let whole = |i: usize| match fields.get(i) {
        Some(field) => field
            .parse::<usize>()
            .map_err(|_| format!("{field:?} is not a whole number")),
        None => Ok(0),
    };
    let arrival: f64 = fields[0]
        .parse()
        .ok()
        .filter(|t: &f64| t.is_finite() && *t >= 0.0)
        .ok_or_else(|| format!("{:?} is not a time in seconds", fields[0]))?;
    let prompt = whole(1)?;
    Ok(Arrival {
        arrival,
        prompt,
        output: u32::try_from(whole(2)?).map_err(|_| "output too long".to_owned())?,
        class: whole(3)? as u64,
        shared: whole(4)?.min(prompt),
    })
}
