//! nano-vllm-serve
fn main() {}
