//! Our logits and greedy tokens against `transformers`, for every family and every attention
//! backend, through the paged cache. The fixtures and the answers are made by
//! `scripts/make_fixtures.py`, which also checks that a wrong reading of each config would fail.

mod demo;
mod driver;
mod oracle;

use std::path::Path;

use oracle::{Case, GREEDY, LENGTHS, LogitsRow, TOLERANCE, cases, folder, relative_error};
use tch::Tensor;
use tp_model::{Backend, DtypeChoice, LoadOptions, Model};

/// Block size and tokens a step. The last one has neither a divisor in common with the other
/// sizes nor a prompt that fills its last block.
const PATHS: [(usize, usize); 4] = [(16, usize::MAX), (64, 64), (1, 333), (5, 7)];

fn load(folder: &Path, backend: Backend) -> Model {
    // Many tests run side by side, and the tensors are tiny.
    tch::set_num_threads(1);
    let options = LoadOptions {
        dtype: DtypeChoice::Float32,
        backend,
        ..LoadOptions::default()
    };
    Model::load(folder, &options).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs `tokens` in chunks through one sequence; the logits of all of them.
fn forward(
    model: &Model,
    tokens: &[u32],
    num_prompt: usize,
    (block_size, chunk): (usize, usize),
) -> Vec<Vec<f32>> {
    let mut session = model
        .session(num_prompt, tokens.len(), block_size)
        .expect("session");
    let mut rows = Vec::new();
    for piece in tokens.chunks(chunk) {
        let logits = session.forward(piece).expect("forward");
        rows.extend(to_rows(&logits, piece.len(), model.config().vocab_size));
    }
    rows
}

fn to_rows(logits: &Tensor, rows: usize, vocab: usize) -> Vec<Vec<f32>> {
    assert_eq!(logits.size(), [rows as i64, vocab as i64]);
    let mut values = vec![0f32; rows * vocab];
    let count = values.len();
    logits.contiguous().view([-1]).copy_data(&mut values, count);
    values.chunks_exact(vocab).map(<[f32]>::to_vec).collect()
}

fn compare<'a>(what: &str, got: &[Vec<f32>], want: impl Iterator<Item = &'a LogitsRow>) -> f64 {
    let mut worst = 0f64;
    for row in want {
        let error = relative_error(&got[row.position], &row.logits);
        assert!(
            error <= TOLERANCE,
            "{what}, position {}: logits are off by {error:.2e} (allowed {TOLERANCE:.0e})",
            row.position
        );
        worst = worst.max(error);
    }
    worst
}

/// Prompt and continuation in chunks of every kind.
fn check_logits(name: &str, backend: Backend) {
    let model = load(&folder(name), backend);
    let mut worst = 0f64;
    for Case {
        prompt,
        greedy,
        rows,
        step_rows,
    } in &cases(name)
    {
        for path in PATHS {
            let what = format!("{name}, {backend:?}, prompt of {}, {path:?}", prompt.len());
            // The continuation is fed as given, so that one wrong token does not hide the rest.
            // In short steps only as far as the oracle's logits of step 60, to save time.
            let tail = if path.1 < 64 { 61 } else { GREEDY };
            let tokens = [prompt, &greedy[..tail]].concat();
            let got = forward(&model, &tokens, prompt.len(), path);
            let steps = step_rows.iter().filter(|row| row.position < got.len());
            worst = worst.max(compare(&what, &got, rows.iter().chain(steps)));
        }
    }
    println!("{name}, {backend:?}: logits within {worst:.1e}");
}

/// All prompts at once through the runner, in steps of several sizes.
fn check_greedy(name: &str, backend: Backend, (block_size, budget): (usize, usize)) {
    let cases = cases(name);
    let prompts: Vec<(&[u32], usize)> = cases.iter().map(|c| (&c.prompt[..], GREEDY)).collect();
    let got = driver::greedy(load(&folder(name), backend), &prompts, block_size, budget);
    for (case, got) in cases.iter().zip(&got) {
        let agree = got
            .iter()
            .zip(&case.greedy)
            .take_while(|(a, b)| a == b)
            .count();
        assert_eq!(
            agree,
            GREEDY,
            "{name}, {backend:?}, prompt of {}, blocks of {block_size}, {budget} tokens a step: \
             token {agree} differs",
            case.prompt.len()
        );
    }
}

/// The shortest way in, one prompt of each fixture.
fn check_generate_greedy(name: &str) {
    let case = &cases(name)[2];
    let got = load(&folder(name), Backend::Auto)
        .generate_greedy(&case.prompt, GREEDY, 16)
        .expect("generate");
    assert_eq!(got, case.greedy, "{name}");
}

macro_rules! fixtures {
    ($($module:ident = $name:literal;)*) => {
        const FIXTURES: &[&str] = &[$($name),*];
        $(mod $module {
            use super::{Backend, check_generate_greedy, check_greedy, check_logits};

            #[test]
            fn logits_reference() {
                check_logits($name, Backend::Reference);
            }

            #[test]
            fn logits_torch() {
                check_logits($name, Backend::Torch);
            }

            #[test]
            fn logits_cpu() {
                check_logits($name, Backend::Cpu);
            }

            #[test]
            fn greedy_reference() {
                check_greedy($name, Backend::Reference, (16, 64));
            }

            #[test]
            fn greedy_torch() {
                check_greedy($name, Backend::Torch, (64, 4096));
            }

            #[test]
            fn greedy_cpu() {
                check_greedy($name, Backend::Cpu, (16, 4096));
                check_greedy($name, Backend::Cpu, (1, 23));
            }

            #[test]
            fn generate_greedy() {
                check_generate_greedy($name);
            }
        })*
    };
}

fixtures! {
    llama2_mha = "llama2-mha";
    llama3_gqa4 = "llama3-gqa4";
    llama_linear = "llama-linear";
    llama_dynamic = "llama-dynamic";
    llama_yarn = "llama-yarn";
    llama_bias = "llama-bias";
    mistral_window = "mistral-window";
    mistral_headdim = "mistral-headdim";
    qwen2_tied = "qwen2-tied";
    qwen2_window_mix = "qwen2-window-mix";
    qwen3_headdim = "qwen3-headdim";
    qwen3_yarn = "qwen3-yarn";
}

#[test]
fn every_fixture_is_tested() {
    let mut stored: Vec<String> = std::fs::read_dir(folder(""))
        .expect("fixtures")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.join("golden.safetensors").exists())
        .map(|path| {
            path.file_name()
                .expect("name")
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    stored.sort();
    let mut tested: Vec<&str> = FIXTURES.to_vec();
    tested.sort_unstable();
    assert_eq!(stored, tested);
    assert_eq!(LENGTHS.len(), cases(FIXTURES[0]).len());
}

#[test]
fn the_comparison_tells_what_it_must() {
    let want = [3.0, -4.0, 0.0, 1.0];
    assert_eq!(relative_error(&want, &want), 0.0);
    assert!(relative_error(&[3.0, -4.0, 0.001, 1.0], &want) > TOLERANCE);
    for bad in [f32::NAN, f32::INFINITY] {
        let error = relative_error(&[3.0, -4.0, bad, 1.0], &want);
        assert!(error.is_nan() || error > TOLERANCE, "{error}");
    }
}
