// A matrix W [N, K] in one buffer of u32 words, `w`, decoded four or eight weights at a time.
//
//   kind = "quant":  w[n, k] = codebook[nibble] * scale[block] (+ min[block]), the canonical 4-bit
//   form
//   kind = "f32" | "f16" | "bf16" | "q8_0":  a dense matrix in its own precision
//
// Rows of codes (or values) are `row_words` words apart. Blocks run over the flat index n * K + k.
// `ragged` (K is not a multiple of 8): a word may straddle two blocks, and weights past K must
// read as zero. Include after `Params`, which holds `m: Matrix` and `k: u32`, and after the
// binding `w`.
//
// `wide`: the form for hardware. The same buffer is bound a second time as `w4`, with loads 16
// bytes wide. If the codebook needs a table, it is in workgroup memory: call
// `fill_codebook(thread)` first, with a barrier before anything is decoded. `chunked`: 32 weights
// that one such load brings, and that begin at a multiple of 32, lie in one block.
{% set wide = wide is defined and wide %}

struct W8 {
    lo: vec4<f32>, // k, k + 1, k + 2, k + 3
    hi: vec4<f32>, // k + 4 ... k + 7
}

fn word_as_f32(at: u32) -> f32 {
    return bitcast<f32>(w[at]);
}

{# `NAME_of` in two steps. The second step must wait for the code before it can look in the table,
   so it is placed where the loads of the first step have finished. #}
{% macro block_value(name, how) %}
{% set other = "min_" if name == "min" %}
{% if how == "double" %}
// Stored form of a block's {{ name }}: the word with its code, which starts at bit `shift`, and
// its super-scale.
struct Stored{{ name | title }} {
    word: u32,
    shift: u32,
    above: f32,
}

fn stored_{{ name }}(block: u32) -> Stored{{ name | title }} {
    let super_block = (block + p.m.first_block) >> p.m.super_shift;
    let above = word_as_f32(p.m.{{ other }}supers + super_block);
    return Stored{{ name | title }}(w[p.m.{{ name }}s + (block >> 2u)], 8u * (block & 3u), above);
}

fn {{ name }}_from(stored: Stored{{ name | title }}) -> f32 {
    // Rounded after the product and again after the sum, like the reference.
    let code = (stored.word >> stored.shift) & 255u;
    let scaled = word_as_f32(p.m.{{ other }}table + code) * stored.above;
    return scaled + p.m.{{ other }}offset;
}
{% else %}
alias Stored{{ name | title }} = f32;

fn stored_{{ name }}(block: u32) -> f32 {
    return word_as_f32(p.m.{{ name }}s + block);
}

fn {{ name }}_from(stored: f32) -> f32 {
    return stored;
}
{% endif %}

// The {{ name }} of a block, counted from the first block of this part of the matrix.
fn {{ name }}_of(block: u32) -> f32 {
    return {{ name }}_from(stored_{{ name }}(block));
}
{% endmacro %}

{% if kind == "quant" %}
{{ block_value("scale", scales) }}
{% if mins != "none" %}
{{ block_value("min", mins) }}
{% endif %}

{% if decoder == "select" and share is defined and share %}
// The codebook, half of it in each of two registers of eight lanes. Shuffles read the value of a
// code from there.
var<private> table_lo: f32;
var<private> table_hi: f32;

// Must be called before anything is decoded.
fn fill_table(lane: u32) {
    table_lo = {{ codebook[0] }};
    table_hi = {{ codebook[8] }};
{% for i in range(1, 8) %}
    table_lo = select(table_lo, {{ codebook[i] }}, lane == {{ i }}u);
    table_hi = select(table_hi, {{ codebook[8 + i] }}, lane == {{ i }}u);
{% endfor %}
}

// The codebook value of the code that starts at this bit of a word.
fn decode(word: u32, start: u32) -> f32 {
    let code = (word >> start) & 7u;
    let is_high = (word & (8u << start)) != 0u;
    return select(subgroupShuffle(table_lo, code), subgroupShuffle(table_hi, code), is_high);
}

// Values of codes 0 to 3, the low half of a word.
fn decode_low(word: u32) -> vec4<f32> {
    return vec4<f32>(decode(word, 0u), decode(word, 4u), decode(word, 8u), decode(word, 12u));
}

// Values of codes 4 to 7.
fn decode_high(word: u32) -> vec4<f32> {
    return vec4<f32>(decode(word, 16u), decode(word, 20u), decode(word, 24u), decode(word, 28u));
}
{% elif decoder == "select" and wide %}
// The codebook in workgroup memory. Sixteen words lie in sixteen banks, so lookups never collide.
var<workgroup> codebook: array<f32, 16>;

fn fill_codebook(thread: u32) {
    if (thread < 16u) {
        var value = {{ codebook[0] }};
{% for i in range(1, 16) %}
        value = select(value, {{ codebook[i] }}, thread == {{ i }}u);
{% endfor %}
        codebook[thread] = value;
    }
}

// Values of codes 0 to 3, the low half of a word.
fn decode_low(word: u32) -> vec4<f32> {
    return vec4<f32>(
        codebook[word & 15u],
        codebook[(word >> 4u) & 15u],
        codebook[(word >> 8u) & 15u],
        codebook[(word >> 12u) & 15u],
    );
}

// Values of codes 4 to 7.
fn decode_high(word: u32) -> vec4<f32> {
    return decode_low(word >> 16u);
}
{% elif decoder == "select" %}
// Codebook values of four codes of a word, whose bits are under the masks: a tree of selects. On
// software drivers this takes half the time of a table in workgroup memory.
fn decode(
    word: u32, bit0: vec4<u32>, bit1: vec4<u32>, bit2: vec4<u32>, bit3: vec4<u32>,
) -> vec4<f32> {
{% for i in range(4) %}
    let b{{ i }} = (vec4<u32>(word) & bit{{ i }}) != vec4<u32>(0u);
{% endfor %}
{% for i in range(8) %}
    let a{{ i }} =
        select(vec4<f32>({{ codebook[2 * i] }}), vec4<f32>({{ codebook[2 * i + 1] }}), b0);
{% endfor %}
{% for i in range(4) %}
    let c{{ i }} = select(a{{ 2 * i }}, a{{ 2 * i + 1 }}, b1);
{% endfor %}
    return select(select(c0, c1, b2), select(c2, c3, b2), b3);
}

// Values of codes 0 to 3, the low half of a word.
fn decode_low(word: u32) -> vec4<f32> {
    let bit = vec4<u32>(0x1u, 0x10u, 0x100u, 0x1000u);
    return decode(word, bit, bit << vec4<u32>(1u), bit << vec4<u32>(2u), bit << vec4<u32>(3u));
}

// Values of codes 4 to 7.
fn decode_high(word: u32) -> vec4<f32> {
    let bit = vec4<u32>(0x10000u, 0x100000u, 0x1000000u, 0x10000000u);
    return decode(word, bit, bit << vec4<u32>(1u), bit << vec4<u32>(2u), bit << vec4<u32>(3u));
}
{% else %}
// Codebook values of four codes of a word, which start at these bits.
fn decode(word: u32, start: vec4<u32>) -> vec4<f32> {
{% if decoder == "offset" %}
    // The codebook counts up by one from its first value.
    return vec4<f32>((vec4<u32>(word) >> start) & vec4<u32>(15u)) + vec4<f32>({{ codebook[0] }});
{% else %}
    // The codebook is two's complement.
    let signed = bitcast<vec4<i32>>(vec4<u32>(word) << (vec4<u32>(28u) - start)) >> vec4<u32>(28u);
    return vec4<f32>(signed);
{% endif %}
}

// Values of codes 0 to 3, the low half of a word.
fn decode_low(word: u32) -> vec4<f32> {
    return decode(word, vec4<u32>(0u, 4u, 8u, 12u));
}

// Values of codes 4 to 7.
fn decode_high(word: u32) -> vec4<f32> {
    return decode(word, vec4<u32>(16u, 20u, 24u, 28u));
}
{% endif %}

// The block of weight [n, k].
fn block_of(n: u32, k: u32) -> u32 {
    return (n * p.k + k + p.m.first_weight) >> p.m.block_shift;
}
{% endif %}

{% if wide %}
{% if kind != "quant" or decoder != "select" %}
// There is no table to fill.
fn fill_codebook(thread: u32) {}
{% endif %}

{% if chunked %}
// The codes of w[n, 32c .. 32c + 32].
fn codes_of(n: u32, c: u32) -> vec4<u32> {
    return w4[n * (p.m.row_words >> 2u) + c];
}
{% endif %}
{% endif %}

{% if kind == "quant" and not ragged %}
// Eight weights of a word that lies within `block`.
fn decode_word(word: u32, block: u32) -> W8 {
    let scale = vec4<f32>(scale_of(block));
    var lo = decode_low(word) * scale;
    var hi = decode_high(word) * scale;
{% if mins != "none" %}
    let low = vec4<f32>(min_of(block));
    lo = lo + low;
    hi = hi + low;
{% endif %}
    return W8(lo, hi);
}

// w[n, 8g .. 8g + 8]
fn weights8(n: u32, g: u32) -> W8 {
    return decode_word(w[n * p.m.row_words + g], block_of(n, 8u * g));
}

// w[n, 4q .. 4q + 4]
fn weights4(n: u32, q: u32) -> vec4<f32> {
    let word = w[n * p.m.row_words + (q >> 1u)] >> (16u * (q & 1u));
    let block = block_of(n, 4u * q);
{% if mins != "none" %}
    return decode_low(word) * vec4<f32>(scale_of(block)) + vec4<f32>(min_of(block));
{% else %}
    return decode_low(word) * vec4<f32>(scale_of(block));
{% endif %}
}

{% elif kind == "quant" %}
// w[n, 4q .. 4q + 4], zero past K. A block has at least 32 weights, so four weights touch at most
// two blocks.
fn weights4(n: u32, q: u32) -> vec4<f32> {
    let word = w[n * p.m.row_words + (q >> 1u)] >> (16u * (q & 1u));
    let k = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
    let flat = vec4<u32>(n * p.k + p.m.first_weight) + k;
    let block = flat.x >> p.m.block_shift;
    // Two scales beyond the last block are stored, so block + 1 can always be read.
    let next = (flat >> vec4<u32>(p.m.block_shift)) != vec4<u32>(block);
    let scale = select(vec4<f32>(scale_of(block)), vec4<f32>(scale_of(block + 1u)), next);
    var values = decode_low(word) * scale;
{% if mins != "none" %}
    let low = select(vec4<f32>(min_of(block)), vec4<f32>(min_of(block + 1u)), next);
    values = values + low;
{% endif %}
    return select(vec4<f32>(0.0), values, k < vec4<u32>(p.k));
}

{% elif kind == "f32" %}
// w[n, 4q .. 4q + 4]; rows end in zeros.
fn weights4(n: u32, q: u32) -> vec4<f32> {
{% if wide %}
    return bitcast<vec4<f32>>(w4[n * (p.m.row_words >> 2u) + q]);
{% else %}
    let at = n * p.m.row_words + 4u * q;
    return vec4<f32>(
        word_as_f32(at), word_as_f32(at + 1u), word_as_f32(at + 2u), word_as_f32(at + 3u),
    );
{% endif %}
}

{% elif kind == "f16" %}
// w[n, 4q .. 4q + 4]; rows end in zeros.
fn weights4(n: u32, q: u32) -> vec4<f32> {
    let at = n * p.m.row_words + 2u * q;
    return vec4<f32>(unpack2x16float(w[at]), unpack2x16float(w[at + 1u]));
}

{% elif kind == "bf16" %}
// w[n, 4q .. 4q + 4]; rows end in zeros. bf16 is the upper half of an f32.
fn weights4(n: u32, q: u32) -> vec4<f32> {
    let at = n * p.m.row_words + 2u * q;
    let a = w[at];
    let b = w[at + 1u];
    return bitcast<vec4<f32>>(vec4<u32>(a << 16u, a & 0xffff0000u, b << 16u, b & 0xffff0000u));
}

{% elif kind == "q8_0" %}
// w[n, 4q .. 4q + 4]: bytes times the f16 scale of their 32 weights.
fn weights4(n: u32, q: u32) -> vec4<f32> {
    let word = w[n * p.m.row_words + q];
    let block = (n * p.k + 4u * q) >> 5u;
    let pair = unpack2x16float(w[p.m.scales + (block >> 1u)]);
    let scale = select(pair.x, pair.y, (block & 1u) == 1u);
    let shifted = vec4<u32>(word << 24u, word << 16u, word << 8u, word);
    let signed = bitcast<vec4<i32>>(shifted) >> vec4<u32>(24u);
    return vec4<f32>(signed) * scale;
}
{% endif %}

{% if wide and kind == "f16" %}
// w[n, 8g .. 8g + 8]
fn weights8(n: u32, g: u32) -> W8 {
    let words = w4[n * (p.m.row_words >> 2u) + g];
    return W8(
        vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)),
        vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w)),
    );
}
{% elif wide and kind == "bf16" %}
// w[n, 8g .. 8g + 8]
fn weights8(n: u32, g: u32) -> W8 {
    let words = w4[n * (p.m.row_words >> 2u) + g];
    let even = bitcast<vec4<f32>>(words << vec4<u32>(16u));
    let odd = bitcast<vec4<f32>>(words & vec4<u32>(0xffff0000u));
    return W8(vec4<f32>(even.x, odd.x, even.y, odd.y), vec4<f32>(even.z, odd.z, even.w, odd.w));
}
{% elif kind != "quant" or ragged %}
// w[n, 8g .. 8g + 8]
fn weights8(n: u32, g: u32) -> W8 {
    return W8(weights4(n, 2u * g), weights4(n, 2u * g + 1u));
}
{% endif %}
