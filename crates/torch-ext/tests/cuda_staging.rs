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
    let mut staging = Staging::new(0);
    // More copies than there are buffers, each of another size and kind, all at once under way.
    let sent: Vec<(Tensor, Tensor)> = (0..19i64)
        .map(|i| {
            let kind = [Kind::BFloat16, Kind::Float, Kind::Int64][i as usize % 3];
            let size = [i * 37 % 200, 1 + i * 11];
            let from = Tensor::randint(1 << 20, size, (Kind::Int64, Device::Cpu)).to_kind(kind);
            let to = Tensor::full(size, -1.0, (kind, Device::Cuda(0)));
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
