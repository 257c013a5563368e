//! The kernel for AMX, the matrix unit of Intel's server CPUs. One instruction multiplies a 16 x 32 tile
//! with a 32 x 16 tile of bf16 values and adds the products in f32, sixteen times as fast as f32
//! vector instructions. AMX treats factors and sums with a magnitude below 1.2e-38 as zero.
//!
//! std has no stable intrinsics for AMX, so this file uses inline assembly (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 1, chapter 18).

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m256bh, __m256i, __m512, __m512bh, __m512i, _mm512_add_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::cell::Cell;
use std::sync::OnceLock;
use std::thread::LocalKey;

use super::blocks::{FactorPart, Kernel, OutputStrip};

/// Rows of a tile, and 32-bit values in each row.
const TILE_SIDE: usize = 16;
/// Terms of each lane in a tile.
const TERMS: usize = 2 * TILE_SIDE;
/// Rows and columns computed at a time: two tiles of each factor, whose four products use each loaded tile
/// twice.
const KERNEL_SIDE: usize = 2 * TILE_SIDE;

/// One row of a tile: 16 pairs of bf16.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct TileRow([u32; TILE_SIDE]);

/// A packed tile of 16 lanes (rows of the left factor or columns of the right one, see [`Kernel`]). Each row holds 16
/// pairs of terms of one lane, or one pair of terms of all lanes.
type Tile = [__m512i; TILE_SIDE];

/// A kernel that computes 32 x 32 values at a time. A value of this type proves that the CPU has AMX and that
/// the system lets this process use it.
#[derive(Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    /// Detects AMX and requests permission to use it, once per process.
    pub(crate) fn detect() -> Option<Self> {
        static IS_USABLE: OnceLock<bool> = OnceLock::new();
        IS_USABLE.get_or_init(is_usable).then_some(Self(()))
    }
}

#[cfg(target_os = "linux")]
fn is_usable() -> bool {
    /// Bits of CPUID leaf 7, register EDX.
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    /// `ARCH_REQ_XCOMP_PERM` of Linux.
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    /// `XFEATURE_XTILE_DATA`: the contents of the tiles.
    const TILE_DATA: libc::c_long = 18;
    let has_vectors = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16");
    // Every CPU with AVX-512 has this CPUID leaf.
    let has_tiles =
        has_vectors && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE;
    // Linux supports AMX since 5.16. A process may use the tiles only after this request.
    // SAFETY: the call only changes the permissions of this process.
    has_tiles && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
}

#[cfg(not(target_os = "linux"))]
fn is_usable() -> bool {
    false
}

thread_local! {
    static BUFFERS: [Cell<Vec<TileRow>>; 2] = const { [Cell::new(Vec::new()), Cell::new(Vec::new())] };
}

impl Kernel for Amx {
    const ROWS: usize = KERNEL_SIDE;
    const COLS: usize = KERNEL_SIDE;
    const STEP: usize = TERMS;
    const MAX_TERMS: usize = 1024;
    type Element = TileRow;

    /// Tiles of 16 lanes, one lane per row.
    fn pack_rows(self, part: FactorPart, packed: &mut [TileRow]) {
        // SAFETY: `detect` found the features.
        unsafe { pack::<false>(part, packed) }
    }

    /// Tiles of 16 lanes, one pair of terms per row.
    fn pack_cols(self, part: FactorPart, packed: &mut [TileRow]) {
        // SAFETY: `detect` found the features.
        unsafe { pack::<true>(part, packed) }
    }

    fn multiply(self, rows: &[TileRow], cols: &[TileRow], depth: usize, strip: OutputStrip) {
        // SAFETY: `detect` found the features and the permission to use them.
        unsafe { multiply(rows, cols, depth, strip) }
    }

    fn buffers() -> &'static LocalKey<[Cell<Vec<TileRow>>; 2]> {
        &BUFFERS
    }
}

/// Packs panels of 32 lanes: two tiles of 16 lanes for every 32 terms.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn pack<const PAIRS: bool>(part: FactorPart, packed: &mut [TileRow]) {
    // Number of elements per lane, as in `Kernel::multiply`. An element has 32 terms.
    let depth = part.terms.div_ceil(TERMS);
    let panels = packed.len() / (depth * KERNEL_SIDE);
    for k in 0..depth {
        for panel in 0..panels {
            for half in 0..2 {
                let tile =
                    packed_tile::<PAIRS>(part, panel * KERNEL_SIDE + half * TILE_SIDE, k * TERMS);
                let first = ((panel * depth + k) * 2 + half) * TILE_SIDE;
                for (row, packed) in tile.into_iter().zip(&mut packed[first..first + TILE_SIDE]) {
                    // SAFETY: a row has 512 bits.
                    unsafe { _mm512_storeu_si512(packed.0.as_mut_ptr().cast(), row) };
                }
            }
        }
    }
}

/// Returns the tile of the 16 lanes that begin at `lane` and the 32 terms that begin at `term`. With `PAIRS`, each
/// row holds one pair of terms of all lanes; else, all terms of one lane. Values past the end are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
#[inline]
fn packed_tile<const PAIRS: bool>(part: FactorPart, lane: usize, term: usize) -> Tile {
    let mut tile = [_mm512_setzero_si512(); TILE_SIDE];
    if lane >= part.lanes {
        return tile;
    }
    let part = FactorPart {
        values: &part.values[lane * part.lane_stride + term * part.term_stride..],
        lanes: TILE_SIDE.min(part.lanes - lane),
        terms: TERMS.min(part.terms - term),
        ..part
    };
    // If lanes are adjacent in memory, each row is loaded as one pair of terms of all lanes, otherwise as one lane. The
    // tile is transposed if the caller needs the other layout.
    let is_loaded_in_pairs = part.lane_stride == 1;
    if is_loaded_in_pairs {
        for (pair, row) in tile.iter_mut().enumerate().take(part.terms.div_ceil(2)) {
            let bf16_lanes = |term: usize| {
                let lanes = part
                    .values
                    .get(term * part.term_stride..)
                    .unwrap_or_default();
                let lanes = if term < part.terms { lanes } else { &[] };
                bf16_row(load(&lanes[..part.lanes.min(lanes.len())]))
            };
            *row = _mm512_or_si512(
                bf16_lanes(2 * pair),
                _mm512_slli_epi32::<16>(bf16_lanes(2 * pair + 1)),
            );
        }
    } else {
        let mut gathered = [0.0; TERMS];
        for (lane, row) in tile.iter_mut().enumerate().take(part.lanes) {
            let values = &part.values[lane * part.lane_stride..];
            let values = match part.term_stride {
                1 => &values[..part.terms],
                stride => {
                    let values = values.iter().step_by(stride).take(part.terms);
                    gathered
                        .iter_mut()
                        .zip(values)
                        .for_each(|(term, v)| *term = *v);
                    &gathered[..part.terms]
                }
            };
            let (low, high) = values.split_at(part.terms.min(TILE_SIDE));
            *row = bits(_mm512_cvtne2ps_pbh(load(high), load(low)));
        }
    }
    if is_loaded_in_pairs == PAIRS {
        tile
    } else {
        transposed(tile)
    }
}

/// Loads at most 16 values, padded with zeros.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(values: &[f32]) -> __m512 {
    // SAFETY: the mask selects as many values as the slice has.
    unsafe { _mm512_maskz_loadu_ps(mask(values.len()), values.as_ptr()) }
}

/// Returns a mask of the first `width` values of a vector.
fn mask(width: usize) -> u16 {
    ((1u32 << width.min(TILE_SIDE)) - 1) as u16
}

/// Rounds values to bf16, each in the low half of 32 bits.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn bf16_row(values: __m512) -> __m512i {
    let rounded: __m256bh = _mm512_cvtneps_pbh(values);
    // SAFETY: both types have 256 bits and no invalid bit patterns.
    _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
}

/// Reinterprets 32 bf16 values as 16 integers of 32 bits.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn bits(values: __m512bh) -> __m512i {
    // SAFETY: both types have 512 bits and no invalid bit patterns.
    unsafe { std::mem::transmute(values) }
}

/// Transposes a tile of 16 x 16 32-bit values, in four rounds that combine rows 1, 2, 4 and 8 apart.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(tile: Tile) -> Tile {
    let mut a = tile;
    let mut b = tile;
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    // Quarter q of a[4 g + j] holds value 4 q + j of each of the rows 4 g .. 4 g + 4. From here on, 0x88 selects
    // quarters 0 and 2 of both vectors, and 0xdd quarters 1 and 3.
    for i in 0..4 {
        for half in 0..2 {
            let (left, right) = (a[8 * half + i], a[8 * half + 4 + i]);
            b[8 * half + i] = _mm512_shuffle_i32x4::<0x88>(left, right);
            b[8 * half + 4 + i] = _mm512_shuffle_i32x4::<0xdd>(left, right);
        }
    }
    for i in 0..4 {
        a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[8 + i]);
        a[8 + i] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[8 + i]);
        a[4 + i] = _mm512_shuffle_i32x4::<0x88>(b[4 + i], b[12 + i]);
        a[12 + i] = _mm512_shuffle_i32x4::<0xdd>(b[4 + i], b[12 + i]);
    }
    a
}

/// The tile configuration that the CPU loads: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static TILE_CONFIG: TileConfig = TileConfig {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// See [`Kernel::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn multiply(rows: &[TileRow], cols: &[TileRow], depth: usize, strip: OutputStrip) {
    // SAFETY: the configuration is valid. Tiles belong to this thread, and are released below.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const TILE_CONFIG, options(nostack, readonly, preserves_flags));
    }
    // Sums of a tile at the edge of the output, where fewer than 32 rows or columns are left.
    let mut edge = [[0.0f32; KERNEL_SIDE]; KERNEL_SIDE];
    for (j, cols) in cols.chunks_exact(depth * KERNEL_SIDE).enumerate() {
        let width = KERNEL_SIDE.min(strip.cols - j * KERNEL_SIDE);
        for (i, rows) in rows.chunks_exact(depth * KERNEL_SIDE).enumerate() {
            let height = KERNEL_SIDE.min(strip.rows - i * KERNEL_SIDE);
            let first = i * KERNEL_SIDE * strip.stride + strip.first + j * KERNEL_SIDE;
            let out = &mut strip.values[first..];
            if width == KERNEL_SIDE && height == KERNEL_SIDE {
                assert!(out.len() >= (KERNEL_SIDE - 1) * strip.stride + KERNEL_SIDE);
                // SAFETY: both panels have `depth` pairs of tiles, and the output has 32 rows of 32 values.
                unsafe {
                    multiply_panels(rows, cols, depth, out.as_mut_ptr(), strip.stride, strip.add)
                };
                continue;
            }
            // SAFETY: as above, with `edge` as the output.
            unsafe {
                multiply_panels(
                    rows,
                    cols,
                    depth,
                    edge.as_mut_ptr().cast(),
                    KERNEL_SIDE,
                    false,
                )
            };
            for (line, sums) in out.chunks_mut(strip.stride).take(height).zip(&edge) {
                let mut remaining = &mut line[..width];
                for sums in sums.chunks_exact(TILE_SIDE) {
                    let (half, next_half) = remaining.split_at_mut(TILE_SIDE.min(remaining.len()));
                    let sum = load(sums);
                    let sum = if strip.add {
                        _mm512_add_ps(load(half), sum)
                    } else {
                        sum
                    };
                    // SAFETY: the mask selects as many values as `half` has.
                    unsafe { _mm512_mask_storeu_ps(half.as_mut_ptr(), mask(half.len()), sum) };
                    remaining = next_half;
                }
            }
        }
    }
    // SAFETY: releases the tiles, which this function no longer uses.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// Multiplies a panel of 32 rows with one of 32 columns, and writes the 32 x 32 sums to `out`, or adds them with `add`.
///
/// # Safety
/// Both panels have `depth` times 32 tile rows, and `depth` is not 0. `out` points to 32 rows of 32
/// values, `stride` values apart. The tile configuration is loaded.
#[inline]
unsafe fn multiply_panels(
    rows: &[TileRow],
    cols: &[TileRow],
    depth: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    // Sums: tmm0 and tmm1 in the upper 16 rows, tmm2 and tmm3 in the lower ones. A row of a tile has 64 bytes, a
    // tile 1024. Each round of the loop reads the next two tiles of both factors, 2048 bytes each.
    // SAFETY: the code reads and writes only the memory that the caller's contract describes.
    unsafe {
        let below = out.wrapping_add(TILE_SIDE * stride);
        asm!(
            "test {add}, {add}",
            "jz 3f",
            "tileloadd tmm0, [{out} + {stride} * 4]",
            "tileloadd tmm1, [{out} + {stride} * 4 + 64]",
            "tileloadd tmm2, [{below} + {stride} * 4]",
            "tileloadd tmm3, [{below} + {stride} * 4 + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{rows} + {row_bytes}]",
            "tileloadd tmm6, [{cols} + {row_bytes}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{cols} + {row_bytes} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{rows} + {row_bytes} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {rows}, 2048",
            "add {cols}, 2048",
            "dec {depth}",
            "jnz 2b",
            "tilestored [{out} + {stride} * 4], tmm0",
            "tilestored [{out} + {stride} * 4 + 64], tmm1",
            "tilestored [{below} + {stride} * 4], tmm2",
            "tilestored [{below} + {stride} * 4 + 64], tmm3",
            rows = inout(reg) rows.as_ptr() => _,
            cols = inout(reg) cols.as_ptr() => _,
            depth = inout(reg) depth => _,
            row_bytes = in(reg) 64usize,
            add = in(reg) usize::from(add),
            out = in(reg) out,
            below = in(reg) below,
            stride = in(reg) stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
