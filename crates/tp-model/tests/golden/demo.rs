//! The demo model against `transformers`: whole answers, and the logits at some of their tokens.
//! `scripts/demo_model/golden.py` stored them.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tp_model::Backend;

use crate::oracle::{TOLERANCE, folder};
use crate::{driver, forward, load};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    top: Vec<Top>,
}

/// The largest logits before one token of the answer.
#[derive(Deserialize)]
struct Top {
    step: usize,
    ids: Vec<usize>,
    logits: Vec<f64>,
}

fn model_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

fn golden() -> Vec<Case> {
    let text = std::fs::read(folder("demo").join("golden.json")).expect("demo/golden.json");
    let golden: Golden = serde_json::from_slice(&text).expect("demo/golden.json");
    assert!(golden.cases.len() >= 10);
    golden.cases
}

fn check(backend: Backend, block_size: usize, budget: usize) {
    let cases = golden();
    let model = load(&model_folder(), backend);
    for case in &cases {
        let tokens = [&case.prompt[..], &case.greedy].concat();
        let got = forward(&model, &tokens, case.prompt.len(), (block_size, budget));
        for top in &case.top {
            let row = &got[case.prompt.len() - 1 + top.step];
            let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
            assert_eq!(top.ids.len(), top.logits.len());
            for (&id, want) in top.ids.iter().zip(&top.logits) {
                let error = (f64::from(row[id]) - want).abs() / f64::from(largest);
                assert!(
                    error <= TOLERANCE,
                    "{}, {backend:?}, step {}: logit of token {id} is off by {error:.2e}",
                    case.name,
                    top.step
                );
            }
        }
    }
    let prompts: Vec<(&[u32], usize)> = cases
        .iter()
        .map(|case| (&case.prompt[..], case.greedy.len()))
        .collect();
    let answers = driver::greedy(model, &prompts, block_size, budget);
    for (case, answer) in cases.iter().zip(answers) {
        assert_eq!(answer, case.greedy, "{}, {backend:?}", case.name);
    }
}

#[test]
fn reference() {
    check(Backend::Reference, 16, 4096);
}

#[test]
fn torch() {
    check(Backend::Torch, 64, 64);
}

#[test]
fn cpu() {
    check(Backend::Cpu, 16, 50);
}
