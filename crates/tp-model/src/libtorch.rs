//! What libtorch says when it fails.

/// What tch panics with around a message, which it has escaped as Rust does.
const PANIC: &str = "called `Result::unwrap()` on an `Err` value: Torch(\"";

/// A message of libtorch without the C++ frames that it appends, and without what tch puts around it.
/// Frames name files of this machine, and clients get to see this.
pub(crate) fn message(text: &str) -> String {
    let (text, panics) = match text.strip_prefix(PANIC) {
        Some(inner) => (inner.strip_suffix("\")").unwrap_or(inner), true),
        None => (text, false),
    };
    let frames = ["Exception raised from ", "frame #0: "];
    let end = frames.iter().filter_map(|mark| text.find(mark)).min();
    let text = &text[..end.unwrap_or(text.len())];
    let text = match panics {
        true => text.replace("\\n", "\n").replace("\\\"", "\""),
        false => text.to_owned(),
    };
    text.trim_end().to_owned()
}

/// Whether a message of libtorch says that an allocation failed, on a GPU or on the host. tch passes
/// nothing on but the message.
pub(crate) fn tells_of_memory(message: &str) -> bool {
    [
        "CUDA out of memory",
        "CUDA error: out of memory",
        // Of a handle or a workspace of cuBLAS.
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "can't allocate memory",
    ]
    .iter()
    .any(|sign| message.contains(sign))
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn frames_are_left_out() {
        let panic = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA error: \
                     CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\\nException raised from \
                     createCublasHandle at /pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp:90 (most recent \
                     call first):\\nframe #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x9d \
                     (0x7f in /somewhere/libc10.so)\\n\")";
        let said = message(panic);
        assert_eq!(
            said,
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        );
        assert!(tells_of_memory(&said));
        let plain = "CUDA out of memory. Tried to allocate 64.00 MiB.\nException raised from malloc at /a.cpp:1\n";
        assert_eq!(
            message(plain),
            "CUDA out of memory. Tried to allocate 64.00 MiB."
        );
        assert_eq!(message("a stage has no output"), "a stage has no output");
        assert!(!tells_of_memory("a stage has no output"));
    }

    /// What tch and libtorch say today, not what they were copied from.
    #[test]
    fn libtorchs_own_messages() {
        let (a, b) = (
            Tensor::ones([2, 3], (Kind::Float, Device::Cpu)),
            Tensor::ones([2, 3], (Kind::Float, Device::Cpu)),
        );
        let error = a.f_matmul(&b).unwrap_err().to_string();
        let panic = catch_unwind(|| a.matmul(&b)).unwrap_err();
        let panic = panic.downcast_ref::<String>().expect("a text");
        for text in [&error, panic] {
            let said = message(text);
            assert!(
                said.contains("mat1 and mat2 shapes cannot be multiplied"),
                "{said}"
            );
            for mark in ["frame #", "Exception raised", "unwrap", "\\n", ".cpp"] {
                assert!(!said.contains(mark), "{said}");
            }
        }
        let large = || Tensor::f_empty([1 << 60], (Kind::Uint8, Device::Cpu));
        assert!(tells_of_memory(&message(&large().unwrap_err().to_string())));
    }
}
