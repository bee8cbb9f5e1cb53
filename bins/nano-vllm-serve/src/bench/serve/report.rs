//! Figures from outcomes.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::connection::Outcome;
use crate::say::say;

/// Prints the figures as vLLM does, and returns them under vLLM's keys.
pub fn print(
    outcomes: &[Outcome],
    elapsed: Duration,
    percentiles: &[f64],
) -> anyhow::Result<Value> {
    let good: Vec<&Outcome> = outcomes.iter().filter(|o| o.error.is_none()).collect();
    let seconds = elapsed.as_secs_f64();
    let input: usize = good.iter().map(|o| o.input_len).sum();
    let output: usize = good.iter().map(|o| o.output_len).sum();
    let chunks: usize = good.iter().map(|o| o.itls.len() + 1).sum();
    let mut figures = Map::new();
    let mut put = |name: &str, value: Value| figures.insert(name.to_owned(), value);
    say("============ Serving Benchmark Result ============")?;
    for (label, key, value) in [
        ("Successful requests:", "completed", good.len()),
        ("Failed requests:", "failed", outcomes.len() - good.len()),
        ("Total input tokens:", "total_input_tokens", input),
        ("Total generated tokens:", "total_output_tokens", output),
        ("Chunks:", "chunks", chunks),
    ] {
        say(format_args!("{label:<40}{value:<10}"))?;
        put(key, json!(value));
    }
    for (label, key, value) in [
        ("Benchmark duration (s):", "duration", seconds),
        (
            "Request throughput (req/s):",
            "request_throughput",
            good.len() as f64 / seconds,
        ),
        (
            "Output token throughput (tok/s):",
            "output_throughput",
            output as f64 / seconds,
        ),
        (
            "Total token throughput (tok/s):",
            "total_token_throughput",
            (input + output) as f64 / seconds,
        ),
    ] {
        say(format_args!("{label:<40}{value:<10.2}"))?;
        put(key, json!(value));
    }
    let ms = |d: &Duration| d.as_secs_f64() * 1e3;
    let tpot = |o: &&&Outcome| ms(&(o.latency - o.ttft)) / (o.output_len - 1) as f64;
    let several = good.iter().filter(|o| o.output_len > 1);
    let kinds: [(&str, &str, Vec<f64>); 4] = [
        (
            "Time to First Token",
            "ttft",
            good.iter().map(|o| ms(&o.ttft)).collect(),
        ),
        (
            "Time per Output Token (excl. 1st token)",
            "tpot",
            several.map(|o| tpot(&o)).collect(),
        ),
        (
            "Inter-token Latency",
            "itl",
            good.iter().flat_map(|o| &o.itls).map(ms).collect(),
        ),
        (
            "End-to-end Latency",
            "e2el",
            good.iter().map(|o| ms(&o.latency)).collect(),
        ),
    ];
    for (title, key, mut values) in kinds {
        values.sort_by(f64::total_cmp);
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        let upper = key.to_uppercase();
        say(format_args!("{title:-^50}"))?;
        let mut line = |name: &str, short: String, value: f64| {
            put(&format!("{short}_{key}_ms"), json!(value));
            say(format_args!(
                "{:<40}{value:<10.2}",
                format!("{name} {upper} (ms):")
            ))
        };
        line("Mean", "mean".into(), mean)?;
        line("Median", "median".into(), quantile(&values, 50.0))?;
        line("Std", "std".into(), variance.sqrt())?;
        for p in percentiles {
            line(&format!("P{p}"), format!("p{p}"), quantile(&values, *p))?;
        }
    }
    say("==================================================")?;
    let list = |of: fn(&Outcome) -> Value| good.iter().map(|o| of(o)).collect::<Vec<_>>();
    put("input_lens", json!(list(|o| json!(o.input_len))));
    put("output_lens", json!(list(|o| json!(o.output_len))));
    put("ttfts", json!(list(|o| json!(o.ttft.as_secs_f64()))));
    Ok(Value::Object(figures))
}

/// Linear between the two nearest values, as NumPy does it. `values` are sorted.
fn quantile(values: &[f64], percent: f64) -> f64 {
    let Some(last) = values.len().checked_sub(1) else {
        return 0.0;
    };
    let at = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
    let (low, high) = (values[at.floor() as usize], values[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// The first failed request's reason.
pub fn first_error(outcomes: &[Outcome]) -> &str {
    let mut errors = outcomes.iter().filter_map(|o| o.error.as_deref());
    errors.next().unwrap_or("none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        assert_eq!(quantile(&[], 50.0), 0.0);
        assert_eq!(quantile(&[3.0], 99.0), 3.0);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 5.0], 50.0), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 5.0], 100.0), 5.0);
    }
}
