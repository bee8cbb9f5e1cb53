//! The sampling kernels' own text, run on the CPU against a float64 reference: see `emulated/grid.h`. Needs
//! a C++ compiler, as the crate does, and no GPU.
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
        .replace("extern \"C\" __global__", "__global__")
}

/// The program, built from kernels that `change` was applied to.
fn build(name: &str, change: impl Fn(&str, String) -> String) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let kernels: [(&str, &[&str]); 3] = [
        ("sample_scan", &["sample.cuh"]),
        ("sample_select", &["sample.cuh", "sample_select.cuh"]),
        ("sample_race", &["sample.cuh"]),
    ];
    for (kernel_name, shared) in kernels {
        let text = change(kernel_name, kernel(shared, kernel_name));
        std::fs::write(folder.join(format!("{kernel_name}.h")), text).unwrap();
    }
    let program = folder.join("sampling");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let sources = root().join("tests/emulated");
    let built = Command::new(&compiler)
        .args(["-O2", "-std=c++17", "-w", "-ffp-contract=off", "-I"])
        .arg(&folder)
        .arg(sources.join("sampling.cpp"))
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
    let program = build("right", |_, text| text);
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
        let program = build(&format!("wrong{i}"), |name, text| {
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
