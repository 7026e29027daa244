// ids[0] = a token chosen by its logit:
// {{ "the likeliest one" if greedy else "one drawn at random from the likeliest" }}. 0xffffffff if
// a logit is NaN.
{% if not greedy %}
//
// Tokens are ordered by likelihood: larger logits first, equal logits by lower id. A token's
// weight is an integer, 2^31 exp((logit - largest) / T). Likelihoods have a resolution of 2^-14
// octaves, and weights below 1 are 0. All sums are integers, so they are exact in any order. A
// place in the order is found by two histograms: first of 1/16 octaves, then of the steps within
// one of these.
{% endif %}
// A single workgroup does everything.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    len: u32,      // logits
    top_k: u32,    // number of tokens to keep; 0: all
    cut_p: u32,    // 1: keep only the likeliest tokens whose weights reach top_p
    top_p: u32,    // as a share of all weights, in units of 2^-32
    random: u32,   // random number in units of 2^-32
    steps: f32,    // steps per logit difference of 1
    farthest: f32, // difference from the largest logit at which weights become 0
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> logits: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;

const NONE = 0xffffffffu;

// The largest key of some threads, and the first token with that key.
var<workgroup> best: array<vec2<u32>, {{ threads }}>;

// Keys have the order of the logits; both zeros are equal. NaN has the largest key. Past the last
// logit the key is 0, the smallest.
fn keys4(quad: u32) -> vec4<u32> {
    let bits = logits[quad];
    let keys = select(bits | vec4<u32>(0x80000000u), ~bits, bits > vec4<u32>(0x80000000u));
    let is_nan = (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    let exists = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.len);
    return select(vec4<u32>(0u), select(keys, vec4<u32>(NONE), is_nan), exists);
}

// Puts the largest key, and the first token with that key, in best[0].
fn likeliest(thread: u32, quads: u32) {
    var keys = vec4<u32>(0u);
    var at = vec4<u32>(0u);
    for (var quad = thread; quad < quads; quad = quad + {{ threads }}u) {
        let next = keys4(quad);
        at = select(at, vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u), next > keys);
        keys = max(keys, next);
    }
    let key = max(max(keys.x, keys.y), max(keys.z, keys.w));
    let first = select(vec4<u32>(NONE), at, keys == vec4<u32>(key));
    best[thread] = vec2<u32>(key, min(min(first.x, first.y), min(first.z, first.w)));
    for (var half = {{ threads // 2 }}u; half > 0u; half = half >> 1u) {
        workgroupBarrier();
        if (thread < half) {
            let other = best[thread + half];
            let ties = other.x == best[thread].x && other.y < best[thread].y;
            if (other.x > best[thread].x || ties) {
                best[thread] = other;
            }
        }
    }
    workgroupBarrier();
}

{% if not greedy %}
const BINS = 512u;
const STEPS = 1024u; // per bin

// A number of tokens, and the sum of their weights in two words.
struct Sum {
    count: u32,
    low: u32,
    high: u32,
}

// The sum of each thread's bins.
var<workgroup> partial: array<Sum, {{ threads }}>;
var<workgroup> counts: array<atomic<u32>, BINS>;
var<workgroup> lows: array<atomic<u32>, BINS>;
var<workgroup> highs: array<atomic<u32>, BINS>;
var<workgroup> fine: array<atomic<u32>, STEPS>;
// The place where a sum reaches its target: the bin, the sum before it, and the tokens in it.
var<workgroup> found: u32;
var<workgroup> above: Sum;
var<workgroup> members: u32;

fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + u32(low < a.x));
}

fn subtract(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - u32(a.x < b.x));
}

fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn multiply(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let one = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (one & 0xffffu);
    let lower = (other << 16u) | (low & 0xffffu);
    return vec2<u32>(lower, (a >> 16u) * (b >> 16u) + (one >> 16u) + (other >> 16u));
}

// a * part / 2^32
fn part_of(a: vec2<u32>, part: u32) -> vec2<u32> {
    return add(multiply(a.y, part), vec2<u32>(multiply(a.x, part).y, 0u));
}

// 2^31 * 2^(-q / 2^14). The fractional power is a polynomial in 16 bits.
fn weight(q: u32) -> u32 {
    let f = (q & 0x3fffu) << 2u;
    let y = 611u - ((f * 59u) >> 16u);
    let z = 15750u - ((f * (3643u - ((f * y) >> 16u))) >> 16u);
    return ((65536u - ((f * (45427u - ((f * z) >> 16u))) >> 16u)) << 15u) >> (q >> 14u);
}

// The logits, with infinities replaced by large numbers.
fn values4(keys: vec4<u32>) -> vec4<f32> {
    let bits = select(~keys, keys & vec4<u32>(0x7fffffffu), keys >= vec4<u32>(0x80000000u));
    return clamp(bitcast<vec4<f32>>(bits), vec4<f32>(-1e38), vec4<f32>(1e38));
}

// Steps from the largest logit; NONE if the weight is 0.
fn steps4(keys: vec4<u32>, largest: vec4<f32>) -> vec4<u32> {
    let far = largest - values4(keys);
    let near = (far < vec4<f32>(p.farthest)) & (keys > vec4<u32>(0u));
    return select(vec4<u32>(NONE), vec4<u32>(min(far, vec4<f32>(p.farthest)) * p.steps), near);
}

fn plus(a: Sum, b: Sum) -> Sum {
    let sum = add(vec2<u32>(a.low, a.high), vec2<u32>(b.low, b.high));
    return Sum(a.count + b.count, sum.x, sum.y);
}

fn reaches(sum: Sum, by_count: bool, target_sum: vec2<u32>) -> bool {
    let reached = select(vec2<u32>(sum.low, sum.high), vec2<u32>(sum.count, 0u), by_count);
    return !less(reached, target_sum);
}

// The sum before this thread's bins; `own` is the sum of these bins.
fn before(thread: u32, own: Sum) -> Sum {
    workgroupBarrier();
    partial[thread] = own;
    workgroupBarrier();
    var sum = Sum(0u, 0u, 0u);
    for (var i = 0u; i < thread; i = i + 1u) {
        sum = plus(sum, partial[i]);
    }
    return sum;
}

fn tally(q: u32) {
    if (q != NONE) {
        let w = weight(q);
        let bin = q / STEPS;
        if (p.top_k > 0u) {
            atomicAdd(&counts[bin], 1u);
        }
        let low = atomicAdd(&lows[bin], w);
        if (low + w < low) {
            atomicAdd(&highs[bin], 1u);
        }
    }
}

fn coarse_sum(bin: u32) -> Sum {
    return Sum(atomicLoad(&counts[bin]), atomicLoad(&lows[bin]), atomicLoad(&highs[bin]));
}

// The sum of the tokens `bin` steps after `start`.
fn fine_sum(start: u32, bin: u32) -> Sum {
    let count = atomicLoad(&fine[bin]);
    let sum = multiply(count, weight(start + bin));
    return Sum(count, sum.x, sum.y);
}

{# The thread whose bins, of `bins`, reach the target finds the bin that does. The block is the sum
   of a bin. #}
{% macro locate(bins) %}
    if (!reaches(start, by_count, target_sum)) {
        var sum = start;
        for (var i = 0u; i < {{ bins }} / {{ threads }}u; i = i + 1u) {
            let bin = {{ bins }} / {{ threads }}u * thread + i;
            let of_bin = {{ caller() }};
            let through = plus(sum, of_bin);
            if (reaches(through, by_count, target_sum)) {
                found = bin;
                above = sum;
                members = of_bin.count;
                break;
            }
            sum = through;
        }
    }
    workgroupBarrier();
{% endmacro %}

// Finds the bin of `fine` in which tokens or weights reach the target; `offset` counts first.
fn locate_fine(thread: u32, first: u32, offset: Sum, by_count: bool, target_sum: vec2<u32>) {
    var own = Sum(0u, 0u, 0u);
    for (var i = 0u; i < STEPS / {{ threads }}u; i = i + 1u) {
        own = plus(own, fine_sum(first, STEPS / {{ threads }}u * thread + i));
    }
    let start = plus(offset, before(thread, own));
{% call locate("STEPS") %}fine_sum(first, bin){% endcall %}
}

fn clear_fine(thread: u32) {
    workgroupBarrier();
    for (var i = thread; i < STEPS; i = i + {{ threads }}u) {
        atomicStore(&fine[i], 0u);
    }
    workgroupBarrier();
}

// A place in the order of likelihood.
struct Place {
    q: u32,      // steps of its token
    rank: u32,   // rank of its token among those with the same q
    through: vec2<u32>, // sum of the weights up to and including it
}

// Finds the place where tokens or weights reach the target; `start` is the sum before this
// thread's bins.
fn search(
    thread: u32, quads: u32, largest: vec4<f32>, start: Sum, by_count: bool, target_sum: vec2<u32>,
) -> Place {
    // All threads have read the result of the last search.
    workgroupBarrier();
{% call locate("BINS") %}coarse_sum(bin){% endcall %}
    let first = found * STEPS;
    let offset = above;
    clear_fine(thread);
    for (var quad = thread; quad < quads; quad = quad + {{ threads }}u) {
        let q = steps4(keys4(quad), largest);
{% for e in "xyzw" %}
        if (q.{{ e }} / STEPS == first / STEPS) {
            atomicAdd(&fine[q.{{ e }} % STEPS], 1u);
        }
{% endfor %}
    }
    workgroupBarrier();
    locate_fine(thread, first, offset, by_count, target_sum);
    let q = first + found;
    let w = weight(q);
    let over = vec2<u32>(above.low, above.high);
    var rank = 0u;
    if (by_count) {
        rank = target_sum.x - above.count - 1u;
    } else {
        // The maximum number of tokens with this weight that do not reach the target.
        let missing = subtract(target_sum, over);
        for (var bit = 0x80000000u; bit > 0u; bit = bit >> 1u) {
            if (less(multiply(rank | bit, w), missing)) {
                rank = rank | bit;
            }
        }
    }
    return Place(q, rank, add(over, multiply(rank + 1u, w)));
}

// Writes the token at this place.
fn write(thread: u32, quads: u32, largest: vec4<f32>, place: Place) {
    let several = workgroupUniformLoad(&members) > 1u;
    var rank = place.rank;
    var key = 0u;
    if (several) {
        // The remaining logits differ by less than a step, or not at all. Narrows down by the bits
        // of their keys, eight at a time.
        for (var shift = 32u; shift > 0u;) {
            shift = shift - 8u;
            clear_fine(thread);
            for (var quad = thread; quad < quads; quad = quad + {{ threads }}u) {
                let keys = keys4(quad);
                let q = steps4(keys, largest);
{% for e in "xyzw" %}
                if (q.{{ e }} == place.q && (keys.{{ e }} >> shift) >> 8u == key) {
                    atomicAdd(&fine[255u - ((keys.{{ e }} >> shift) & 255u)], 1u);
                }
{% endfor %}
            }
            workgroupBarrier();
            locate_fine(thread, 0u, Sum(0u, 0u, 0u), true, vec2<u32>(rank + 1u, 0u));
            rank = rank - above.count;
            key = (key << 8u) | (255u - found);
        }
    }
    // Each thread has a run of consecutive tokens, because ids decide their order.
    let run = (quads + {{ threads - 1 }}u) / {{ threads }}u;
    let end = min((thread + 1u) * run, quads);
    var own = 0u;
    for (var quad = thread * run; quad < end; quad = quad + 1u) {
        let chosen = chosen4(quad, largest, place.q, several, key);
        let ones = select(vec4<u32>(0u), vec4<u32>(1u), chosen);
        own = own + ones.x + ones.y + ones.z + ones.w;
    }
    var count = before(thread, Sum(own, 0u, 0u)).count;
    if (rank >= count && rank < count + own) {
        for (var quad = thread * run; quad < end; quad = quad + 1u) {
            let chosen = chosen4(quad, largest, place.q, several, key);
{% for e in range(4) %}
            if (chosen.{{ "xyzw"[e] }}) {
                if (count == rank) {
                    ids[0] = 4u * quad + {{ e }}u;
                }
                count = count + 1u;
            }
{% endfor %}
        }
    }
}

fn chosen4(quad: u32, largest: vec4<f32>, q: u32, several: bool, key: u32) -> vec4<bool> {
    let keys = keys4(quad);
    let same = steps4(keys, largest) == vec4<u32>(q);
    return select(same, keys == vec4<u32>(key), vec4<bool>(several));
}
{% endif %}

{% call entry.each_group(threads) %}
    let quads = (p.len + 3u) >> 2u;
    likeliest(thread, quads);
{% if greedy %}
    if (thread == 0u) {
        ids[0] = select(best[0].y, NONE, best[0].x == NONE);
    }
{% else %}
    for (var i = thread; i < BINS; i = i + {{ threads }}u) {
        atomicStore(&counts[i], 0u);
        atomicStore(&lows[i], 0u);
        atomicStore(&highs[i], 0u);
    }
    let key = workgroupUniformLoad(&best[0]).x;
    if (key == NONE) {
        if (thread == 0u) {
            ids[0] = NONE;
        }
        return;
    }
    let largest = values4(vec4<u32>(key));
    for (var quad = thread; quad < quads; quad = quad + {{ threads }}u) {
        let q = steps4(keys4(quad), largest);
        tally(q.x);
        tally(q.y);
        tally(q.z);
        tally(q.w);
    }
    workgroupBarrier();
    var own = Sum(0u, 0u, 0u);
    for (var i = 0u; i < BINS / {{ threads }}u; i = i + 1u) {
        own = plus(own, coarse_sum(BINS / {{ threads }}u * thread + i));
    }
    let start = before(thread, own);
    workgroupBarrier();
    // The last thread's sum is the total.
    partial[thread] = plus(start, own);
    workgroupBarrier();
    let total = partial[{{ threads - 1 }}];
    var kept = vec2<u32>(total.low, total.high);
    if (p.top_k > 0u) {
        let few = vec2<u32>(min(p.top_k, total.count), 0u);
        kept = search(thread, quads, largest, start, true, few).through;
    }
    if (p.cut_p > 0u) {
        let part = part_of(kept, p.top_p);
        let least = select(part, vec2<u32>(1u, 0u), all(part == vec2<u32>(0u)));
        kept = search(thread, quads, largest, start, false, least).through;
    }
    let drawn = add(part_of(kept, p.random), vec2<u32>(1u, 0u));
    write(thread, quads, largest, search(thread, quads, largest, start, false, drawn));
{% endif %}
{% endcall %}
