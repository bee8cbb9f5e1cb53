//! Time and memory of a model on this machine: loading, prefill and decode without a scheduler.
//!
//! ```text
//! figures DIRECTORY [float32|bfloat16|float16] [dummy|safetensors] [THREADS] [cpu|cuda]
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use batch_scheduler::{AdmittedSeq, ModelRunner, Row, SampleRow, SlotId, StepPlan};
use paged_kv::BlockId;
use sampler::SamplingParams;
use tp_model::{LoadOptions, Model, Runner, RunnerConfig, SeqParams};

const BLOCK: usize = 16;
const PROMPT: usize = 128;
const STEPS: usize = 32;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |at: usize, default: &str| args.get(at).map_or(default.to_owned(), String::clone);
    let threads: usize = arg(4, "2").parse()?;
    torch_ext::cpu::set_num_threads(threads);

    let start = Instant::now();
    let options = LoadOptions {
        dtype: arg(2, "auto").parse()?,
        format: arg(3, "dummy").parse()?,
        device: match arg(5, "cpu").as_str() {
            "cuda" => tch::Device::Cuda(0),
            _ => tch::Device::Cpu,
        },
        ..LoadOptions::default()
    };
    let model = Model::load(Path::new(&arg(1, ".")), &options)?;
    let weights = model.weight_bytes() as f64;
    println!(
        "load         {:8.2} s, {:.2} GB of weights",
        start.elapsed().as_secs_f64(),
        weights / 1e9
    );

    let config = RunnerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 1024,
        max_model_len: 1024,
        block_size: BLOCK,
        num_blocks: 1 + 8 * 64,
    };
    let mut runner = Runner::new(model, &config)?;
    let mut bench = Bench {
        step: 0,
        active: Vec::new(),
    };

    let seconds = bench.run(&mut runner, &[512], 0)?;
    println!("prefill 512  {:8.1} tok/s", 512.0 / seconds[0]);
    for batch in [1, 2, 4, 8] {
        let seconds = bench.run(&mut runner, &vec![PROMPT; batch], STEPS)?;
        let mut steps = seconds[1..].to_vec();
        steps.sort_by(f64::total_cmp);
        let median = steps[steps.len() / 2];
        println!(
            "decode {batch}     {:8.2} tok/s, {:.2} ms a step, {:.1} GB/s of weights",
            batch as f64 / median,
            median * 1e3,
            weights / median / 1e9,
        );
    }
    let cache = runner.model().kv_bytes_per_block(BLOCK) * config.num_blocks;
    println!(
        "peak memory  {:8.2} GB, of which {:.2} GB are the KV cache",
        peak_memory_gb(),
        cache as f64 / 1e9
    );
    Ok(())
}

/// Plans made by hand: one prefill of all prompts, then steps of one token each.
struct Bench {
    step: u64,
    active: Vec<SlotId>,
}

impl Bench {
    /// Seconds of each step.
    fn run(
        &mut self,
        runner: &mut Runner,
        prompts: &[usize],
        steps: usize,
    ) -> Result<Vec<f64>, tp_model::RunnerError> {
        let params = Arc::new(SeqParams {
            sampling: Arc::new(SamplingParams::greedy()),
            seed: 0,
            eos_token_ids: Vec::new(),
        });
        let mut seconds = Vec::new();
        for index in 0..=steps {
            let mut plan = StepPlan {
                step: self.step,
                released: if index == 0 {
                    std::mem::take(&mut self.active)
                } else {
                    Vec::new()
                },
                ..StepPlan::default()
            };
            self.step += 1;
            for (at, &len) in prompts.iter().enumerate() {
                let slot = SlotId(at as u32);
                if index == 0 {
                    self.active.push(slot);
                    let first = 1 + at * 64;
                    plan.admitted.push(AdmittedSeq {
                        slot,
                        tokens: (0..len as u32).map(|i| i * 7 % 1000).collect(),
                        num_prompt: len as u32,
                        num_computed: 0,
                        blocks: (first..first + 64)
                            .map(|b| BlockId::new(b as u32))
                            .collect(),
                        index: 0,
                        params: params.clone(),
                    });
                }
                let (start, count) = match index {
                    0 => (0, len),
                    _ => (len + index - 1, 1),
                };
                plan.samples.push(SampleRow {
                    slot,
                    row: at as u32,
                });
                plan.rows.push(Row {
                    slot,
                    start: start as u32,
                    len: count as u32,
                    table_at: 0,
                    new_blocks: 0..0,
                    drafts: 0..0,
                });
            }
            let start = Instant::now();
            let ticket = runner.launch(plan)?;
            let output = runner.collect(ticket)?;
            seconds.push(start.elapsed().as_secs_f64());
            if let Some(error) = output.samples.iter().find_map(|s| s.error.as_ref()) {
                println!("sampling failed: {error}");
            }
        }
        Ok(seconds)
    }
}

/// Peak resident memory, where the system tells.
fn peak_memory_gb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) * 1024.0 / 1e9
}
