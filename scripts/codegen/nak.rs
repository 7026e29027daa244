//! Parses listings of NVK's compiler, NAK: `block 7 L3 [5, 6] -> {`, then one instruction per
//! line, `@p0 r1 = name operands // delays`, and `} -> [8, 9]` with the blocks that follow.

use std::collections::HashMap;

use crate::listing::{Block, Class, Instruction, Listing};

pub fn parse(text: &str) -> Listing {
    let mut blocks: Vec<Block> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    let mut following: Vec<&str> = Vec::new();
    for line in text.lines() {
        if line.starts_with("block") {
            let number = line.split_whitespace().nth(1).unwrap_or_default();
            index.insert(number, blocks.len());
            blocks.push(Block::default());
            following.push("");
        } else if let Some(next) = line.strip_prefix("} -> [") {
            if let Some(last) = following.last_mut() {
                *last = next.trim_end().trim_end_matches(']');
            }
        } else if let (Some(block), Some(found)) = (blocks.last_mut(), instruction(line)) {
            block.instructions.push(found);
        }
    }
    for (block, next) in blocks.iter_mut().zip(following) {
        block.next = next.split(',').filter_map(|number| index.get(number.trim()).copied()).collect();
    }
    Listing { blocks }
}

fn instruction(line: &str) -> Option<Instruction> {
    let body = line.split("//").next()?.trim();
    let body = match body.strip_prefix('@') {
        Some(guarded) => guarded.split_once(char::is_whitespace)?.1.trim(),
        None => body,
    };
    let (results, operation) = body.split_once(" = ").unwrap_or(("", body));
    let name = operation.split_whitespace().next()?;
    // Registers of the uniform unit, "ur1" and "up0".
    let class = if results.trim_start().starts_with('u') { Class::Scalar } else { class(name) };
    let narrow = matches!(class, Class::GlobalLoad | Class::SharedLoad) && bytes(name) == 2;
    let transposes = name.starts_with("movm");
    Some(Instruction { class, name: name.to_owned(), bytes: bytes(name), gathers: narrow, transposes })
}

fn class(name: &str) -> Class {
    let (local, shared) = (name.contains(".local"), name.contains(".shared"));
    match name.split('.').next().unwrap_or_default() {
        "hmma" | "imma" => Class::Matrix,
        "ffma" | "hfma2" => Class::Fma,
        "mov" | "prmt" | "movm" => Class::Move,
        "sel" | "fsel" => Class::Select,
        "f2f" | "i2f" | "f2i" | "f2fp" => Class::Convert,
        "ld" | "ldg" | "lds" | "st" | "stg" | "sts" if local => Class::Scratch,
        "ldsm" | "lds" => Class::SharedLoad,
        "ld" | "ldg" if shared => Class::SharedLoad,
        "ld" | "ldg" => Class::GlobalLoad,
        "sts" => Class::SharedStore,
        "st" | "stg" if shared => Class::SharedStore,
        "st" | "stg" | "atom" | "atomg" | "red" => Class::GlobalStore,
        "ldc" => Class::Scalar,
        "bra" | "bsync" | "bssy" | "bclear" | "break" | "warpsync" | "exit" | "bar" | "membar" | "nop" | "depbar" => {
            Class::Control
        }
        _ => Class::Vector,
    }
}

/// Bytes per thread: "ld.global.a64.constant.b128".
fn bytes(name: &str) -> u32 {
    let mut bits = name.split('.').filter_map(|part| part.trim_start_matches(['b', 'u', 's', 'i']).parse::<u32>().ok());
    bits.rfind(|bits| [8, 16, 32, 64, 128].contains(bits)).map_or(4, |bits| bits / 8)
}
