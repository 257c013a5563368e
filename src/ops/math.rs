//! Scalar functions and reductions that the compiler can turn into vector instructions.

/// Number of partial sums of a reduction. Several sums let the compiler use vector registers.
const LANES: usize = 8;

/// e^x with a relative error of about 1e-7, in operations that the compiler can vectorise. libm's `expf`
/// would be a call per value.
///
/// x = n ln 2 + f with |f| <= ln 2 / 2, so e^x = 2^n e^f. A polynomial of degree 7 with the coefficients of
/// Cephes' `expf` computes e^f. x is limited to -87 .. 88, where e^x is a normal f32.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    // ln 2 is split into two parts. The first has few bits, which keeps the remainder exact.
    let f = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * f + c;
    }
    // The low bits of `rounded` hold the integer n.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    (p * f * f + f + 1.0) * f32::from_bits(n.wrapping_add(127) << 23)
}

/// ln(e^a + e^b)
pub(crate) fn logaddexp(a: f32, b: f32) -> f32 {
    let (min, max) = if a < b { (a, b) } else { (b, a) };
    max + (min - max).exp().ln_1p()
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Returns the largest of `values`, or -inf if there are none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    // The compiler must not reorder a fold with `f32::max`, and so cannot vectorise it.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut largest = [f32::NEG_INFINITY; 4 * LANES];
    let chunks = values.chunks_exact(4 * LANES);
    let tail = chunks.remainder().iter().copied();
    let tail = tail.fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (largest, &value) in largest.iter_mut().zip(chunk) {
            *largest = larger(*largest, value);
        }
    }
    largest.into_iter().fold(tail, larger)
}

/// Replaces each z of `values` by e^(scale z - max) and returns the sum of the new values.
#[inline(always)]
pub(crate) fn exp_sum(values: &mut [f32], scale: f32, max: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut chunks = values.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] * scale - max);
            sums[lane] += chunk[lane];
        }
    }
    let mut tail = 0.0;
    for value in chunks.into_remainder() {
        *value = exp(*value * scale - max);
        tail += *value;
    }
    sums.iter().sum::<f32>() + tail
}

/// Returns the dot product of `a` and `b`.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of_pairs(a, b, |a, b| a * b)
}

/// Returns the sum of `values`.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    sum_of(values, |value| value)
}

/// Returns the sum of `f(value)` over `values`.
#[inline(always)]
pub(crate) fn sum_of(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().map(|&value| f(value)).sum();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += f(chunk[lane]);
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Returns the sum of `f(a[i], b[i])` over the common length of `a` and `b`.
#[inline(always)]
pub(crate) fn sum_of_pairs(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let common = a.len().min(b.len());
    let a_chunks = a[..common].chunks_exact(LANES);
    let b_chunks = b[..common].chunks_exact(LANES);
    let remainder = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let tail: f32 = remainder.map(|(&a, &b)| f(a, b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += f(a[lane], b[lane]);
        }
    }
    sums.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_include_every_value() {
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        for length in [1, 7, 31, 32, 33, 100] {
            for index in 0..length {
                let mut values = vec![-1.0; length];
                values[index] = 2.0;
                assert_eq!(max(&values), 2.0);
                let total = exp_sum(&mut values, 0.5, 1.0);
                let expected = 1.0 + (length - 1) as f32 * (-1.5f32).exp();
                assert!((total - expected).abs() < 1e-5 * expected);
                assert_eq!(values[index], 1.0);
            }
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8_700..8_800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "exp({x}) is off by {error:e}");
        }
        assert!(exp(-1000.0) < 2e-38 && exp(1000.0).is_finite());
    }
}
