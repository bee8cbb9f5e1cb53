//! Descriptions of matrices in global memory, for the copy engine of Hopper (TMA).

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;
use tch::{Kind, Tensor};

use super::CudaError;
use super::kernels::check;

/// How a tensor lies in memory, and which boxes of it are copied to shared memory, in rows of 128
/// bytes with the 128-byte swizzle. A launch copies it; the tensor's memory must outlive the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Of a bfloat16 or float16 tensor, seen as `sizes` elements `strides` elements apart, innermost
    /// first; the innermost stride is 1 and left out. A box is `boxes` elements, 64 of them along
    /// the innermost dimension, at most 256 along others. What a box has outside arrives as zeros.
    ///
    /// The tensor must start at a multiple of 16 bytes, and so must every stride.
    pub(crate) fn new<const N: usize>(
        tensor: &Tensor,
        sizes: [usize; N],
        strides: &[usize],
        boxes: [usize; N],
    ) -> Result<Self, CudaError> {
        let kind = match tensor.kind() {
            Kind::BFloat16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let sizes = sizes.map(|size| size as u64);
        // Bytes. One for every dimension but the first.
        let strides: Vec<u64> = strides.iter().map(|stride| 2 * *stride as u64).collect();
        if strides.len() + 1 != N {
            let found = strides.len();
            return Err(CudaError(format!(
                "a tensor map of {N} dimensions with {found} strides"
            )));
        }
        let boxes = boxes.map(|size| size as u32);
        let steps = [1u32; N];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: as many sizes, strides and steps as dimensions; a valid place for the result. The
        // driver checks the values and reads nothing of the tensor.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map),
                kind,
                N as u32,
                tensor.data_ptr().cast::<c_void>(),
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(
            result,
            &format!("cuTensorMapEncodeTiled of {sizes:?}, boxes {boxes:?}"),
        )?;
        Ok(Self(map))
    }

    pub(crate) fn as_ptr(&self) -> *const sys::CUtensorMap {
        &self.0
    }
}
