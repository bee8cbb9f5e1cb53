//! The header of a safetensors file: eight bytes of length, then JSON that maps each tensor's
//! name to dtype, shape and byte range. Format: <https://github.com/huggingface/safetensors>.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use tch::Kind;

use crate::error::ModelError;

/// Longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorInfo {
    /// As in the file: `F32`, `BF16`, `I64`...
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Where its bytes are in the file, in row-major order.
    pub bytes: Range<usize>,
}

impl TensorInfo {
    /// The dtype, if it is one that weights can have.
    pub(super) fn kind(&self) -> Option<Kind> {
        match self.dtype.as_str() {
            "F32" => Some(Kind::Float),
            "BF16" => Some(Kind::BFloat16),
            "F16" => Some(Kind::Half),
            _ => None,
        }
    }
}

/// The header's entries, as they stand: a map would keep one of two with the same name.
struct Header(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Bytes of an element, for every dtype of the format; `None` for an unknown name and for types
/// narrower than a byte.
fn element_size(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
        "I16" | "U16" | "F16" | "BF16" => 2,
        "I32" | "U32" | "F32" => 4,
        "I64" | "U64" | "F64" | "C64" => 8,
        _ => return None,
    })
}

/// Reads the header of `file`, which is the whole file, and checks every entry against the
/// file's length.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<BTreeMap<String, TensorInfo>, ModelError> {
    let malformed = |what: String| ModelError::malformed(path, what);
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        let found = file.len();
        return Err(malformed(format!(
            "truncated: expected at least the 8 bytes of a safetensors header length, found {found}"
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(malformed(format!(
            "not a safetensors file: its header would have {length} bytes, expected at most {MAX_HEADER}"
        )));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length) else {
        let found = rest.len();
        return Err(malformed(format!(
            "truncated: expected a header of {length} bytes, found {found}"
        )));
    };
    let header: Header = serde_json::from_slice(header)
        .map_err(|e| malformed(format!("the safetensors header is not valid JSON: {e}")))?;
    let data_start = 8 + length;
    let mut tensors = BTreeMap::new();
    for (name, value) in header.0 {
        if name == "__metadata__" {
            continue;
        }
        let raw: RawInfo = serde_json::from_value(value).map_err(|e| {
            let expected = "dtype, shape and data_offsets in the header";
            ModelError::tensor(path, &name, expected, e.to_string())
        })?;
        let info = check(path, &name, raw, data_start, file.len())?;
        if tensors.contains_key(&name) {
            return Err(ModelError::tensor(
                path,
                &name,
                "one entry in the header",
                "several",
            ));
        }
        tensors.insert(name, info);
    }
    check_cover(path, &tensors, data_start, file.len())?;
    Ok(tensors)
}

/// The tensors must fill the data exactly: a gap or an overlap means that the header, or its
/// length, is not what was written.
fn check_cover(
    path: &Path,
    tensors: &BTreeMap<String, TensorInfo>,
    data_start: usize,
    file_len: usize,
) -> Result<(), ModelError> {
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| (info.bytes.start, info.bytes.end));
    let mut at = data_start;
    for (name, info) in in_order {
        if info.bytes.start != at {
            return Err(ModelError::tensor(
                path,
                name,
                format!("data from byte {at} of the file, where the tensor before it ends"),
                format!(
                    "byte {}; the header or its length is wrong",
                    info.bytes.start
                ),
            ));
        }
        at = info.bytes.end;
    }
    match at == file_len {
        true => Ok(()),
        false => Err(ModelError::malformed(
            path,
            format!("its header's tensors end at byte {at}, expected the file's end ({file_len})"),
        )),
    }
}

fn check(
    path: &Path,
    name: &str,
    raw: RawInfo,
    data_start: usize,
    file_len: usize,
) -> Result<TensorInfo, ModelError> {
    let wrong = |expected: String, found: String| ModelError::tensor(path, name, expected, found);
    let (begin, end) = raw.data_offsets;
    let held = file_len - data_start;
    if begin > end || end > held {
        return Err(wrong(
            format!("data within the file's {held} bytes of tensor data"),
            format!("bytes {begin}..{end}; the file is truncated or its header is wrong"),
        ));
    }
    if let Some(size) = element_size(&raw.dtype) {
        let expected = raw
            .shape
            .iter()
            .try_fold(size, |product, &dim| product.checked_mul(dim));
        if expected != Some(end - begin) {
            let (dtype, shape) = (&raw.dtype, &raw.shape);
            let bytes = expected.map_or("more than 2^64".to_owned(), |n| n.to_string());
            return Err(wrong(
                format!("{bytes} bytes for {dtype} {shape:?}"),
                format!("{} bytes", end - begin),
            ));
        }
    }
    Ok(TensorInfo {
        dtype: raw.dtype,
        shape: raw.shape,
        bytes: data_start + begin..data_start + end,
    })
}
