//! Memory of the host on its way to a GPU.
#![cfg(feature = "cuda")]

use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Staging};

#[test]
fn what_is_sent_arrives() {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    // Loading threads have made no device their own.
    for device in 0..cuda::device_count() {
        std::thread::spawn(move || arrives(device)).join().unwrap();
    }
}

fn arrives(device: usize) {
    let mut staging = Staging::new(device);
    // The stream has work to do before: a buffer that is filled anew too early shows.
    let busy = Tensor::ones([8192, 8192], (Kind::Half, Device::Cuda(device)));
    for _ in 0..20 {
        let _ = busy.matmul(&busy);
    }
    // More copies than there are buffers, each of another size and kind, all at once under way.
    let sent: Vec<(Tensor, Tensor)> = (0..19i64)
        .map(|i| {
            let kind = [Kind::BFloat16, Kind::Float, Kind::Int64][i as usize % 3];
            let size = [i * 37 % 200, 1 + i * 11];
            let from = Tensor::randint(1 << 20, size, (Kind::Int64, Device::Cpu)).to_kind(kind);
            let to = Tensor::full(size, -1.0, (kind, Device::Cuda(device)));
            let mut bytes = vec![0u8; from.numel() * kind.elt_size_in_bytes()];
            from.view_dtype(Kind::Uint8)
                .copy_data_u8(&mut bytes, from.numel() * kind.elt_size_in_bytes());
            // In pieces, none of which is aligned to anything.
            staging.send(&to, bytes.chunks(777)).unwrap();
            // Has been read, so it may go.
            bytes.fill(0xff);
            (from, to)
        })
        .collect();
    staging.finish().unwrap();
    for (from, to) in sent {
        assert!(from.equal(&to.to_device(Device::Cpu)));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    let mut staging = Staging::new(0);
    let to = Tensor::zeros([4, 6], (Kind::Half, Device::Cuda(0)));
    assert!(staging.send(&to, [&[0u8; 47][..]]).is_err());
    assert!(staging.send(&to, [&[0u8; 49][..]]).is_err());
    assert!(staging.send(&to.tr(), [&[0u8; 48][..]]).is_err());
    let cpu = to.to_device(Device::Cpu);
    assert!(staging.send(&cpu, [&[0u8; 48][..]]).is_err());
    // And goes on.
    assert!(staging.send(&to, [&[0u8; 48][..]]).is_ok());
    staging.finish().unwrap();
}
