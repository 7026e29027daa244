//! Inserts checks and marks between the instructions of a compiled template.
//!
//! minijinja limits the steps of a template, but neither how deeply its values are nested nor how
//! much a single instruction does with them. So every instruction that makes or walks through a
//! value is followed by a check. Also, a rendered text doesn't reveal which message a part of it
//! comes from. Marks in the text do. They are placed where loops take their items, and are found
//! again by a sentinel, a character that occurs nowhere else.

use minijinja::Value;
use minijinja::machinery::{Instruction, Instructions};

/// Test for a value that was made or walked through. No template can write such a name.
pub(super) const CHECK: &str = "\u{1}check";
/// Filter for a value that may be computed on demand.
pub(super) const MADE: &str = "\u{1}made";
/// Test for a value that a namespace is about to store.
pub(super) const CHECK_KEPT: &str = "\u{1}check-kept";

/// Filter that marks an item taken by a loop.
pub(super) const MARK_ITEM: &str = "\u{1}mark-item";
/// Filter that marks a value assigned to a variable.
pub(super) const MARK_ASSIGNED: &str = "\u{1}mark-assigned";
/// Filter that marks a value that is written.
pub(super) const MARK_WRITTEN: &str = "\u{1}mark-written";

/// Variable that stands for the start of a `generation` block. It is true.
pub(super) const GENERATION: &str = "generation_starts_here";
/// Variable that stands for the end of a `generation` block. It is true.
pub(super) const END_GENERATION: &str = "generation_ends_here";

/// Marks that need no value.
pub(super) mod mark {
    pub const LOOP: &str = "loop";
    pub const END_LOOP: &str = "end-loop";
    pub const GENERATION: &str = "generation";
    pub const END_GENERATION: &str = "end-generation";
}

/// For tests and filters that minijinja looks up by name every time.
const NOT_CACHED: u8 = !0;

/// Inserts checks and, if there is a sentinel, marks.
pub(super) fn instrument<'s>(code: &Instructions<'s>, sentinel: Option<char>) -> Instructions<'s> {
    let old: Vec<&Instruction<'s>> = (0..).map_while(|at| code.get(at)).collect();
    let direct = written_directly(&old);
    let mut new = Instructions::new(code.name(), code.source());
    let mut starts = Vec::with_capacity(old.len() + 1);
    let mut len = 0u32;
    for (at, instruction) in (0..).zip(&old) {
        starts.push(len);
        // A constant key needs no check; without one, errors can name the missing key.
        let constant =
            at > 0 && matches!((old[at as usize - 1], instruction), (Instruction::LoadConst(_), Instruction::GetItem));
        let expanded =
            if constant { vec![(*instruction).clone()] } else { expand(instruction, sentinel, direct[at as usize]) };
        for instruction in expanded {
            len = 1 + match (code.get_span(at), code.get_line(at)) {
                (Some(span), _) => new.add_with_span(instruction, span),
                (None, Some(line)) => new.add_with_line(instruction, line as u16),
                (None, None) => new.add(instruction),
            };
        }
    }
    starts.push(len);
    for at in 0..len {
        if let Some(target) = new.get_mut(at).and_then(target) {
            *target = starts[(*target as usize).min(old.len())];
        }
    }
    new
}

/// The instruction's jump target, if it has one.
fn target<'i>(instruction: &'i mut Instruction<'_>) -> Option<&'i mut u32> {
    use Instruction::*;
    match instruction {
        Jump(to)
        | JumpIfFalse(to)
        | JumpIfFalseOrPop(to)
        | JumpIfTrueOrPop(to)
        | Iterate(to)
        | BuildMacro(_, to, _) => Some(to),
        _ => None,
    }
}

/// For every instruction, whether its output goes directly to the template's text, not to a macro
/// or to a block whose text becomes a value. Templates may inspect such values, so they get no
/// marks.
fn written_directly(code: &[&Instruction<'_>]) -> Vec<bool> {
    let mut captures = 0usize;
    let mut direct: Vec<bool> = Vec::with_capacity(code.len());
    for instruction in code {
        match instruction {
            Instruction::BeginCapture(_) => captures += 1,
            Instruction::EndCapture => captures = captures.saturating_sub(1),
            _ => {}
        }
        direct.push(captures == 0);
        if let Instruction::BuildMacro(_, start, _) = instruction {
            direct[*start as usize..].fill(false);
        }
    }
    direct
}

/// Returns an instruction with its checks and marks before and after it.
fn expand<'s>(instruction: &Instruction<'s>, sentinel: Option<char>, direct: bool) -> Vec<Instruction<'s>> {
    use Instruction::*;
    let check = |test| [DupTop, PerformTest(test, Some(1), NOT_CACHED), DiscardTop];
    let constant = |s: char, mark: &str| [LoadConst(Value::from(format!("{s}{mark}{s}"))), Emit];
    // The filter gets the value on the stack and the sentinel.
    let of_value = |s: char, filter| {
        [DupTop, LoadConst(Value::from(s.to_string())), ApplyFilter(filter, Some(2), NOT_CACHED), Emit]
    };
    let itself = [instruction.clone()];
    match (instruction, sentinel.filter(|_| direct)) {
        (Lookup(name @ (GENERATION | END_GENERATION)), _) => {
            let mark = if *name == GENERATION { mark::GENERATION } else { mark::END_GENERATION };
            let marked = sentinel.into_iter().flat_map(|s| constant(s, mark));
            marked.chain([LoadConst(Value::from(true))]).collect()
        }
        (PushLoop(_), Some(s)) => constant(s, mark::LOOP).into_iter().chain(itself).collect(),
        (PopLoopFrame, Some(s)) => itself.into_iter().chain(constant(s, mark::END_LOOP)).collect(),
        (Iterate(_), Some(s)) => itself.into_iter().chain(of_value(s, MARK_ITEM)).collect(),
        (StoreLocal(_), Some(s)) => of_value(s, MARK_ASSIGNED).into_iter().chain(itself).collect(),
        (Emit, Some(s)) => of_value(s, MARK_WRITTEN).into_iter().chain(itself).collect(),
        // The namespace is above the value on the stack.
        (SetAttr(_), _) => [Swap].into_iter().chain(check(CHECK_KEPT)).chain([Swap]).chain(itself).collect(),
        (Slice | Add | Mul | ApplyFilter(..) | CallFunction(..) | CallMethod(..) | CallObject(_), _) => {
            itself.into_iter().chain([ApplyFilter(MADE, Some(1), NOT_CACHED)]).collect()
        }
        (
            GetItem
            | BuildMap(_)
            | BuildList(_)
            | BuildTuple(_)
            | StringConcat
            | In
            | Eq
            | Ne
            | Gt
            | Gte
            | Lt
            | Lte
            | CompareAndPreserve(_)
            | PerformTest(..),
            _,
        ) => itself.into_iter().chain(check(CHECK)).collect(),
        _ => itself.into(),
    }
}
