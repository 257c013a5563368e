//! bf16 tiles by the matrix unit (AMX) of Intel's server CPUs, which multiplies blocks of 16 x 32 and
//! 32 x 16 values at a time and adds them up in f32, sixteen times as fast as their vectors do. It takes
//! factors and sums below 1.2e-38 for zero.
//!
//! std has no stable intrinsics for it, so that its instructions stand here as they are (Intel 64 and
//! IA-32 Architectures Software Developer's Manual, volume 1, chapter 18).

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

/// Lines of a block, and 32-bit values in a line.
const TILE_ROWS: usize = 16;
/// Terms in a line: pairs of bf16.
const TERMS: usize = 2 * TILE_ROWS;
/// Rows and columns of a tile: two blocks each way, whose four products share what is loaded.
const KERNEL_SIDE: usize = 2 * TILE_ROWS;

/// 16 pairs of bf16.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct TileRow([u32; TILE_ROWS]);

/// 16 lines of packed pairs: of a lane each, or of a pair of terms each.
type Tile = [__m512i; TILE_ROWS];

/// Tiles of 32 x 32 values. Exists only where the CPU has a matrix unit that this process may use.
#[derive(Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    pub(crate) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(is_usable).then_some(Self(()))
    }
}

#[cfg(target_os = "linux")]
fn is_usable() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    let vectors = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16");
    // A CPU with AVX-512 has this leaf.
    let tiles = vectors && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE;
    // The system saves tiles only for who asks: Linux since 5.16.
    // SAFETY: the call changes nothing but what this process may use.
    tiles && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
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
    const DEPTH: usize = 1024;
    type Element = TileRow;

    /// Blocks of 16 lanes, a line each.
    fn pack_rows(self, part: FactorPart, to: &mut [TileRow]) {
        // SAFETY: `detect` has found the features.
        unsafe { pack::<false>(part, to) }
    }

    /// Blocks of 16 lanes, a pair of terms in each line.
    fn pack_cols(self, part: FactorPart, to: &mut [TileRow]) {
        // SAFETY: `detect` has found the features.
        unsafe { pack::<true>(part, to) }
    }

    fn multiply(self, rows: &[TileRow], cols: &[TileRow], depth: usize, strip: OutputStrip) {
        // SAFETY: `detect` has found the features, and the system lets this process use them.
        unsafe { multiply(rows, cols, depth, strip) }
    }

    fn buffers() -> &'static LocalKey<[Cell<Vec<TileRow>>; 2]> {
        &BUFFERS
    }
}

/// Packs panels of 32 lanes: for every 32 terms, two blocks of 16 lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn pack<const PAIRS: bool>(part: FactorPart, to: &mut [TileRow]) {
    let depth = part.terms.div_ceil(TERMS);
    let panels = to.len() / (depth * KERNEL_SIDE);
    for k in 0..depth {
        for panel in 0..panels {
            for half in 0..2 {
                let block = block::<PAIRS>(part, panel * KERNEL_SIDE + half * TILE_ROWS, k * TERMS);
                let first = ((panel * depth + k) * 2 + half) * TILE_ROWS;
                for (line, to) in block.into_iter().zip(&mut to[first..first + TILE_ROWS]) {
                    // SAFETY: a line has 512 bits.
                    unsafe { _mm512_storeu_si512(to.0.as_mut_ptr().cast(), line) };
                }
            }
        }
    }
}

/// The block of 16 lanes from `lane` on and 32 terms from `term` on, with a pair of terms in each line
/// where `PAIRS`, else a lane. What lies past the end is zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
#[inline]
fn block<const PAIRS: bool>(part: FactorPart, lane: usize, term: usize) -> Tile {
    let mut block = [_mm512_setzero_si512(); TILE_ROWS];
    if lane >= part.lanes {
        return block;
    }
    let part = FactorPart {
        values: &part.values[lane * part.lane + term * part.term..],
        lanes: TILE_ROWS.min(part.lanes - lane),
        terms: TERMS.min(part.terms - term),
        ..part
    };
    let is_paired = part.lane == 1;
    if is_paired {
        for (pair, line) in block.iter_mut().enumerate().take(part.terms.div_ceil(2)) {
            let of = |term: usize| {
                let lanes = part.values.get(term * part.term..).unwrap_or_default();
                let lanes = if term < part.terms { lanes } else { &[] };
                bf16_row(load(&lanes[..part.lanes.min(lanes.len())]))
            };
            *line = _mm512_or_si512(of(2 * pair), _mm512_slli_epi32::<16>(of(2 * pair + 1)));
        }
    } else {
        let mut gathered = [0.0; TERMS];
        for (lane, line) in block.iter_mut().enumerate().take(part.lanes) {
            let values = &part.values[lane * part.lane..];
            let values = match part.term {
                1 => &values[..part.terms],
                apart => {
                    let values = values.iter().step_by(apart).take(part.terms);
                    gathered.iter_mut().zip(values).for_each(|(to, v)| *to = *v);
                    &gathered[..part.terms]
                }
            };
            let (low, high) = values.split_at(part.terms.min(TILE_ROWS));
            *line = bits(_mm512_cvtne2ps_pbh(load(high), load(low)));
        }
    }
    if is_paired == PAIRS {
        block
    } else {
        transposed(block)
    }
}

/// At most 16 values, and zeros after them.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(values: &[f32]) -> __m512 {
    // SAFETY: the mask lets through as many values as there are.
    unsafe { _mm512_maskz_loadu_ps(mask(values.len()), values.as_ptr()) }
}

/// Lets the first `width` values of a vector through.
fn mask(width: usize) -> u16 {
    ((1u32 << width.min(TILE_ROWS)) - 1) as u16
}

/// Values rounded to bf16, each in the low half of 32 bits.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn bf16_row(values: __m512) -> __m512i {
    let rounded: __m256bh = _mm512_cvtneps_pbh(values);
    // SAFETY: both are 256 bits without invalid patterns.
    _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn bits(values: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits without invalid patterns.
    unsafe { std::mem::transmute(values) }
}

/// Swaps lines and their 32-bit values: by one, by two, by four and by eight at a time.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(block: Tile) -> Tile {
    let mut a = block;
    let mut b = block;
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
    // a[4 g + j] holds, in its quarter q, the values 4 q + j of the lines 4 g .. 4 g + 4.
    for i in 0..4 {
        for half in 0..2 {
            let (left, right) = (a[8 * half + i], a[8 * half + 4 + i]);
            b[8 * half + i] = _mm512_shuffle_i32x4::<0x88>(left, right);
            b[8 * half + 4 + i] = _mm512_shuffle_i32x4::<0xdd>(left, right);
        }
    }
    // Quarters 0 and 2 of both, and 1 and 3.
    for i in 0..4 {
        a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[8 + i]);
        a[8 + i] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[8 + i]);
        a[4 + i] = _mm512_shuffle_i32x4::<0x88>(b[4 + i], b[12 + i]);
        a[12 + i] = _mm512_shuffle_i32x4::<0xdd>(b[4 + i], b[12 + i]);
    }
    a
}

/// What the tiles look like: eight of 16 lines of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    lines: [u8; 16],
}

static TILE_CONFIG: TileConfig = TileConfig {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    lines: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn multiply(rows: &[TileRow], cols: &[TileRow], depth: usize, strip: OutputStrip) {
    // SAFETY: the shape is a valid one; tiles are this thread's own, and given back below.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const TILE_CONFIG, options(nostack, readonly, preserves_flags));
    }
    let mut edge = [[0.0f32; KERNEL_SIDE]; KERNEL_SIDE];
    for (j, cols) in cols.chunks_exact(depth * KERNEL_SIDE).enumerate() {
        let width = KERNEL_SIDE.min(strip.cols - j * KERNEL_SIDE);
        for (i, rows) in rows.chunks_exact(depth * KERNEL_SIDE).enumerate() {
            let height = KERNEL_SIDE.min(strip.rows - i * KERNEL_SIDE);
            let first = i * KERNEL_SIDE * strip.stride + strip.first + j * KERNEL_SIDE;
            let out = &mut strip.values[first..];
            if width == KERNEL_SIDE && height == KERNEL_SIDE {
                assert!(out.len() >= (KERNEL_SIDE - 1) * strip.stride + KERNEL_SIDE);
                // SAFETY: both panels have `depth` blocks, and 32 lines of the output 32 values each.
                unsafe { tile(rows, cols, depth, out.as_mut_ptr(), strip.stride, strip.add) };
                continue;
            }
            // SAFETY: as above, for the values of `edge`.
            unsafe {
                tile(
                    rows,
                    cols,
                    depth,
                    edge.as_mut_ptr().cast(),
                    KERNEL_SIDE,
                    false,
                )
            };
            for (line, sums) in out.chunks_mut(strip.stride).take(height).zip(&edge) {
                let mut left = &mut line[..width];
                for sums in sums.chunks_exact(TILE_ROWS) {
                    let (half, rest) = left.split_at_mut(TILE_ROWS.min(left.len()));
                    let sum = load(sums);
                    let sum = match strip.add {
                        true => _mm512_add_ps(load(half), sum),
                        false => sum,
                    };
                    // SAFETY: the mask lets through as many values as `half` has.
                    unsafe { _mm512_mask_storeu_ps(half.as_mut_ptr(), mask(half.len()), sum) };
                    left = rest;
                }
            }
        }
    }
    // SAFETY: gives the tiles back; nothing of this function is in them any more.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// Writes the sums of 32 rows and 32 columns, or adds them to what is there.
///
/// # Safety
/// Both panels have `depth` times 32 lines, `depth` is not 0, `out` points to 32 lines of 32 values,
/// `stride` values apart, and the tiles have their shape.
#[inline]
unsafe fn tile(
    rows: &[TileRow],
    cols: &[TileRow],
    depth: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    // SAFETY: what is read and written is what the caller promises.
    unsafe {
        let below = out.wrapping_add(TILE_ROWS * stride);
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
            "tileloadd tmm4, [{rows} + {line}]",
            "tileloadd tmm6, [{cols} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{cols} + {line} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{rows} + {line} + 1024]",
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
            line = in(reg) 64usize,
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
