//! Parses listings of RADV's compiler, ACO: `BB7:` before a block, then one instruction per line,
//! `name operands ; bytes`.

use std::collections::HashMap;

use crate::listing::{Block, Class, Instruction, Listing};

pub fn parse(text: &str) -> Listing {
    let mut blocks: Vec<Block> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    // Jump targets of each block, and whether it continues with the next one.
    let mut jumps: Vec<(Vec<&str>, bool)> = Vec::new();
    for line in text.lines() {
        if let Some(label) = line.strip_suffix(':').filter(|label| label.starts_with("BB")) {
            index.insert(label, blocks.len());
            blocks.push(Block::default());
            jumps.push((Vec::new(), true));
            continue;
        }
        let body = line.split(';').next().unwrap_or_default().trim();
        let (Some(block), Some(jump)) = (blocks.last_mut(), jumps.last_mut()) else { continue };
        let Some(name) = body.split_whitespace().next().filter(|_| line.starts_with(char::is_whitespace)) else {
            continue;
        };
        if name.starts_with("s_cbranch") || name == "s_branch" {
            jump.0.extend(body.split_whitespace().nth(1));
            jump.1 = name != "s_branch";
        } else if name == "s_endpgm" {
            jump.1 = false;
        }
        block.instructions.push(instruction(name));
        // The other half of a dual instruction.
        if let Some(second) = body.split("::").nth(1).and_then(|second| second.split_whitespace().next()) {
            block.instructions.push(instruction(second));
        }
    }
    for (at, (targets, goes_on)) in jumps.iter().enumerate() {
        let next = targets.iter().filter_map(|label| index.get(label).copied());
        let after = (*goes_on && at + 1 < blocks.len()).then_some(at + 1);
        let mut next: Vec<_> = next.chain(after).collect();
        next.dedup();
        blocks[at].next = next;
    }
    Listing { blocks }
}

fn instruction(name: &str) -> Instruction {
    let class = class(name);
    let load = matches!(class, Class::GlobalLoad | Class::SharedLoad);
    let gathers = load && ["16", "short"].iter().any(|part| name.contains(part));
    Instruction { class, name: name.to_owned(), bytes: bytes(name), gathers, transposes: false }
}

fn class(name: &str) -> Class {
    let starts = |parts: &[&str]| parts.iter().any(|part| name.starts_with(part));
    let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    // Turns "v_dual_fmac_f32" into "v_fmac_f32".
    let plain = name.replacen("v_dual_", "v_", 1);
    let vector = |parts: &[&str]| parts.iter().any(|part| plain.starts_with(part));
    if starts(&["v_wmma", "v_swmmac", "v_mfma"]) {
        Class::Matrix
    } else if vector(&["v_fma", "v_mad_f", "v_mac_f", "v_pk_fma", "v_mad_mix", "v_dot2"]) {
        Class::Fma
    } else if vector(&["v_mov"]) {
        Class::Move
    } else if vector(&["v_cndmask"]) {
        Class::Select
    } else if vector(&["v_cvt"]) {
        Class::Convert
    } else if starts(&["v_"]) {
        Class::Vector
    } else if starts(&["scratch_"]) {
        Class::Scratch
    } else if starts(&["buffer_gl", "buffer_inv", "buffer_wb", "global_inv", "global_wb"]) {
        Class::Control
    } else if starts(&["buffer_", "global_", "flat_"]) {
        if has(&["load"]) { Class::GlobalLoad } else { Class::GlobalStore }
    } else if starts(&["ds_"]) {
        if has(&["store", "write"]) { Class::SharedStore } else { Class::SharedLoad }
    } else if starts(&["s_wait", "s_barrier", "s_delay", "s_nop", "s_clause", "s_cbranch", "s_branch", "s_endpgm"]) {
        Class::Control
    } else {
        Class::Scalar
    }
}

/// Bytes per thread: "b128" or, in older generations, "dwordx4".
fn bytes(name: &str) -> u32 {
    let widths = [("b128", 16), ("b96", 12), ("b64", 8), ("b32", 4), ("x4", 16), ("x3", 12), ("x2", 8), ("dword", 4)];
    let small = [("16", 2), ("short", 2), ("8", 1), ("byte", 1)];
    widths.iter().chain(&small).find(|(part, _)| name.contains(part)).map_or(4, |(_, bytes)| *bytes)
}
