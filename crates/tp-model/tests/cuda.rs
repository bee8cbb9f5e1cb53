//! The same model on a GPU: logits like the CPU's. Where there is none, asking for it is refused.

use std::path::PathBuf;

use tch::{Device, Kind, Tensor};
use tp_model::{Backend, DtypeChoice, LoadOptions, Model, ModelError};

fn try_load(
    name: &str,
    device: Device,
    dtype: DtypeChoice,
    backend: Backend,
) -> Result<Model, ModelError> {
    let dir: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name]
        .iter()
        .collect();
    let options = LoadOptions {
        device,
        dtype,
        backend,
        ..LoadOptions::default()
    };
    Model::load(&dir, &options)
}

fn load(name: &str, device: Device, dtype: DtypeChoice, backend: Backend) -> Model {
    try_load(name, device, dtype, backend).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn logits_on_the_gpu_are_those_of_the_cpu() {
    if !torch_ext::cuda::is_available() {
        let (dtype, backend) = (DtypeChoice::Auto, Backend::Auto);
        let error = try_load("llama-bias", Device::Cuda(0), dtype, backend).unwrap_err();
        assert!(error.to_string().starts_with("device cuda"), "{error}");
        return;
    }
    for name in [
        "qwen3-headdim",
        "qwen2-window-mix",
        "llama-dynamic",
        "llama-bias",
    ] {
        // On the GPU activations are bfloat16 too, so only errors of its rounding may remain.
        for (dtype, allowed) in [(DtypeChoice::Float32, 1e-4), (DtypeChoice::Bfloat16, 5e-2)] {
            let cpu = load(name, Device::Cpu, dtype, Backend::Cpu);
            let vocab = cpu.config().vocab_size as u32;
            let prompt: Vec<u32> = (0..133).map(|i| i * 31 % vocab).collect();
            let want = cpu.forward_logits(&prompt, 133).unwrap();
            for backend in [Backend::Auto, Backend::Reference] {
                let gpu = load(name, Device::Cuda(0), dtype, backend);
                let got = gpu.forward_logits(&prompt, 50).unwrap();
                let rms = |x: &Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
                let error = rms(&(&got - &want)) / rms(&want);
                assert!(
                    error <= allowed,
                    "{name}, {dtype:?}, {backend:?}: off by {error:.1e}"
                );
            }
        }
    }
}
