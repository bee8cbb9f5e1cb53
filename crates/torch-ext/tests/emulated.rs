//! The own text of the kernels that sample and of decode attention, run on the CPU against a float64 reference: see
//! `emulated/grid.h`. Needs a C++ compiler, as the crate does, and no GPU.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `name.cu` behind the text that it shares with others, without what has a stand-in in `grid.h`.
fn kernel(shared: &[&str], name: &str) -> String {
    let folder = root().join("csrc/cuda");
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    let text: String = shared.iter().map(|file| read(file)).collect();
    (text + &read(&format!("{name}.cu")))
        .replace("#include \"common.cuh\"", "")
        .replace(
            "extern __shared__ __align__(128) unsigned char shared[];",
            "u8 *shared = dynamic_shared;",
        )
        .replace("extern \"C\" __global__", "__global__")
}

/// The program that is built from `source`, with what stands in `folder`.
fn compile(folder: &Path, source: &str, defines: &[&str]) -> PathBuf {
    let program = folder.join("program");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let built = Command::new(&compiler)
        .args(["-O2", "-std=c++17", "-w", "-ffp-contract=off", "-I"])
        .arg(folder)
        .args(defines.iter().map(|define| format!("-D{define}")))
        .arg(root().join("tests/emulated").join(source))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    program
}

/// Where a program and its text stand.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The sampling kernels, after `change` was applied to each.
fn sampling(name: &str, change: impl Fn(&str, String) -> String) -> PathBuf {
    let folder = folder(name);
    let kernels: [(&str, &[&str]); 3] = [
        ("sample_scan", &["sample.cuh"]),
        ("sample_select", &["sample.cuh", "sample_select.cuh"]),
        ("sample_race", &["sample.cuh"]),
    ];
    for (kernel_name, shared) in kernels {
        let text = change(kernel_name, kernel(shared, kernel_name));
        std::fs::write(folder.join(format!("{kernel_name}.h")), text).unwrap();
    }
    compile(&folder, "sampling.cpp", &[])
}

/// Decode attention, after `change` was applied to it.
fn attention(name: &str, defines: &[&str], change: impl Fn(String) -> String) -> PathBuf {
    let folder = folder(name);
    let text = kernel(
        &["rope.cuh", "attention_decode_work.cuh"],
        "attention_decode",
    );
    // Loads past L1, in assembler: the program has its own.
    let (before, loads) = text.split_once("DEVICE float2 load_cg(").unwrap();
    let (_, after) = loads.split_once("DEVICE void store_out(").unwrap();
    let text = change(format!("{before}DEVICE void store_out({after}"));
    std::fs::write(folder.join("attention_decode.h"), text).unwrap();
    compile(&folder, "attention.cpp", defines)
}

/// Whether all rows of so many random batches were right, and what the program said.
fn run(program: &Path, seed: u32, batches: u32) -> (bool, String) {
    let args = [seed.to_string(), batches.to_string()];
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.code().is_some(),
        "{:?}: {said}",
        output.status
    );
    (output.status.success(), said)
}

#[test]
fn kernels_draw_the_tokens_of_the_reference() {
    let program = sampling("right", |_, text| text);
    let (right, said) = run(&program, 1, 200);
    assert!(right, "{said}");
}

/// The comparison sees what is slightly wrong.
#[test]
fn slightly_wrong_kernels_are_seen() {
    let wrongs = [
        (
            "sample_select",
            "!by_k || larger < k",
            "!by_k || larger < k - 1",
        ),
        ("sample_select", "total <= target + doubt", "false"),
        ("sample_select", "key >= shared.least ? w", "true ? w"),
        (
            "sample_race",
            "float LN_CHUNK = 4.1588831f",
            "float LN_CHUNK = 0.5f",
        ),
    ];
    for (i, (kernel, right, wrong)) in wrongs.into_iter().enumerate() {
        let program = sampling(&format!("wrong{i}"), |name, text| {
            let here = text.contains(right);
            assert!(here || name != kernel, "{kernel} has no `{right}`");
            match name == kernel {
                true => text.replace(right, wrong),
                false => text,
            }
        });
        let (right, said) = run(&program, 2, 600);
        assert!(!right, "{kernel} with `{wrong}`: {said}");
    }
}

#[rustfmt::skip]
const ATTENTION: [&[&str]; 5] = [
    &["T_BF16", "WARPS=2", "STAGES=3", "HEAD_DIM=128", "WIDE=0", "ANY_BLOCK=0", "SOFT_CAP=0", "FUSED=1", "QK_NORM=1", "ROTARY_DIM=128"],
    &["T_BF16", "WARPS=8", "STAGES=3", "HEAD_DIM=64", "WIDE=0", "ANY_BLOCK=0", "SOFT_CAP=0", "FUSED=1", "QK_NORM=0", "ROTARY_DIM=64"],
    &["T_BF16", "WARPS=8", "STAGES=2", "HEAD_DIM=64", "WIDE=1", "ANY_BLOCK=1", "SOFT_CAP=1", "FUSED=1", "QK_NORM=1", "ROTARY_DIM=64"],
    &["T_BF16", "WARPS=4", "STAGES=4", "HEAD_DIM=80", "WIDE=1", "ANY_BLOCK=0", "SOFT_CAP=0", "FUSED=0", "QK_NORM=0"],
    &["T_BF16", "WARPS=4", "STAGES=1", "HEAD_DIM=96", "WIDE=0", "ANY_BLOCK=1", "SOFT_CAP=1", "FUSED=0", "QK_NORM=0"],
];

/// What is wrong must be so in batches in which nothing else is.
const SEED: u32 = 11;
const BATCHES: u32 = 15;

#[test]
fn decode_attention_equals_the_reference() {
    for (i, defines) in ATTENTION.into_iter().enumerate() {
        let program = attention(&format!("attention{i}"), defines, |text| text);
        let (right, said) = run(&program, SEED, BATCHES);
        assert!(right, "{defines:?}: {said}");
    }
}

#[test]
fn slightly_wrong_attention_is_seen() {
    let wrongs = [
        // One copy may still be on its way; a tile is used up before it is read; the merge buffer is written too early.
        (1, "cp_async_wait<STAGES - 1>()", "cp_async_wait<STAGES>()"),
        (1, "s < STAGES - 1; ++s", "s < STAGES; ++s"),
        (3, "__syncthreads(); // the item before was read", ""),
        (1, "token >= c.context)) x", "token > c.context)) x"),
        (
            3,
            "(to <= from) at = share.end",
            "(to < from) at = share.end",
        ),
        (0, "first_item[i] & 511", "first_item[i] >> 9"),
    ];
    for (i, (defines, right, wrong)) in wrongs.into_iter().enumerate() {
        let program = attention(&format!("wrong_attention{i}"), ATTENTION[defines], |text| {
            assert!(text.contains(right), "no `{right}`");
            text.replace(right, wrong)
        });
        let (right, said) = run(&program, SEED, BATCHES);
        assert!(!right, "`{wrong}`: {said}");
    }
}
