"""Element types: torch's names, their sizes, and their codes in safetensors files."""

from __future__ import annotations

# Every dtype that a document may name, with the bytes of one element. Names are torch's.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "quint8": 1,
    "qint8": 1,
    "qint32": 4,
}

# Whose elements mean something only with a scale.
QUANTIZED = frozenset({"quint8", "qint8", "qint32"})

# The codes that a safetensors header may use here. The library also knows types of less than a
# byte (F4, F6_*), for which torch has no element type of the same shape.
CODES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

# The code under which a pack stores a dtype; any other is stored as U8. F8_E8M0 is left out
# because safetensors' own torch reader fails on it (0.8.0), and a pack opens in every reader.
PACK_CODES = {name: code for code, name in CODES.items() if code != "F8_E8M0"}
