//! The command line.

/// What to simulate.
pub struct Options {
    pub trace: Option<String>,
    pub requests: usize,
    pub rate: f64,
    pub seed: u64,
    pub blocks: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub policies: Vec<String>,
    pub svg: Option<String>,
}

const USAGE: &str = "options: --trace FILE | --requests N --rate PER_SECOND --seed N; \
    --blocks N --max-num-seqs N --max-num-batched-tokens N --policy fcfs,priority,fair --svg FILE";

impl Options {
    pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            trace: None,
            requests: 2000,
            rate: 45.0,
            seed: 0,
            blocks: 1536,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            policies: ["fcfs", "priority", "fair"].map(str::to_owned).to_vec(),
            svg: None,
        };
        while let Some(name) = args.next() {
            if name == "--help" {
                return Err(USAGE.to_owned());
            }
            let value = args
                .next()
                .ok_or_else(|| format!("{name}: a value is missing\n{USAGE}"))?;
            match name.as_str() {
                "--trace" => options.trace = Some(value),
                "--requests" => options.requests = number(&name, &value)?,
                "--rate" => options.rate = number(&name, &value)?,
                "--seed" => options.seed = number(&name, &value)?,
                "--blocks" => options.blocks = number(&name, &value)?,
                "--max-num-seqs" => options.max_num_seqs = number(&name, &value)?,
                "--max-num-batched-tokens" => {
                    options.max_num_batched_tokens = number(&name, &value)?;
                }
                "--policy" => options.policies = value.split(',').map(str::to_owned).collect(),
                "--svg" => options.svg = Some(value),
                _ => return Err(format!("unknown option {name}\n{USAGE}")),
            }
        }
        if !(options.rate.is_finite() && options.rate > 0.0) {
            return Err(format!("--rate is {}; it must be above 0", options.rate));
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{name}: {value:?} is not a number that fits"))
}
