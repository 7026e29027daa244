//! A kernel's machine code as blocks of instructions, with its loops and their contents.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Class of an instruction, as the rules see it. Instructions of a uniform or scalar unit are
/// [`Class::Scalar`]: they run beside the vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    Matrix,
    Fma,
    Select,
    Convert,
    Move,
    /// Any other arithmetic in a vector unit.
    Vector,
    GlobalLoad,
    GlobalStore,
    SharedLoad,
    SharedStore,
    /// Memory of a single thread: spilled registers and indexed arrays.
    Scratch,
    Scalar,
    /// Branches, waits, barriers and hints.
    Control,
}

impl Class {
    /// Whether a vector unit computes it; matrix instructions don't count.
    pub fn is_vector(self) -> bool {
        matches!(self, Class::Fma | Class::Select | Class::Convert | Class::Move | Class::Vector)
    }

    /// Whether it moves values between registers and memory, one value per thread.
    pub fn is_memory(self) -> bool {
        matches!(self, Class::GlobalLoad | Class::GlobalStore | Class::SharedLoad | Class::SharedStore | Class::Scratch)
    }
}

/// One instruction.
pub struct Instruction {
    pub class: Class,
    /// Name in the listing.
    pub name: String,
    /// Bytes per thread, for loads from global memory.
    pub bytes: u32,
    /// Whether it is a load of 16 bits.
    pub gathers: bool,
    /// Whether it transposes a matrix register.
    pub transposes: bool,
}

/// Blocks in the order of the listing; edges are indices of blocks.
#[derive(Default)]
pub struct Listing {
    pub blocks: Vec<Block>,
}

#[derive(Default)]
pub struct Block {
    pub instructions: Vec<Instruction>,
    pub next: Vec<usize>,
}

/// Number of instructions of each kind, each counted once however often it runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    pub classes: BTreeMap<Class, u32>,
    /// Loads from global memory, by their bytes per thread.
    pub loads: BTreeMap<u32, u32>,
    pub gathers: u32,
    pub transposes: u32,
    /// Names of the instructions that touch memory.
    pub memory: BTreeMap<String, u32>,
}

impl Counts {
    pub fn of(&self, class: Class) -> u32 {
        self.classes.get(&class).copied().unwrap_or(0)
    }

    pub fn vector(&self) -> u32 {
        self.classes.iter().filter(|(class, _)| class.is_vector()).map(|(_, count)| count).sum()
    }

    pub fn memory_accesses(&self) -> u32 {
        self.classes.iter().filter(|(class, _)| class.is_memory()).map(|(_, count)| count).sum()
    }

    fn add(&mut self, instruction: &Instruction) {
        *self.classes.entry(instruction.class).or_default() += 1;
        self.gathers += u32::from(instruction.gathers);
        self.transposes += u32::from(instruction.transposes);
        if instruction.class == Class::GlobalLoad {
            *self.loads.entry(instruction.bytes).or_default() += 1;
        }
        if instruction.class.is_memory() {
            *self.memory.entry(instruction.name.clone()).or_default() += 1;
        }
    }
}

/// A loop: the blocks that lead back to its first one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Loop {
    /// Index of its first block.
    pub head: usize,
    /// Number of its blocks.
    pub blocks: usize,
    /// Counts of all its blocks, including those of inner loops.
    pub counts: Counts,
    /// Matrix instructions and FMAs that are not in an inner loop.
    pub own: [u32; 2],
    /// The enclosing loop.
    pub around: Option<usize>,
}

/// Everything the rules need from a listing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub whole: Counts,
    /// Loops, outer before inner.
    pub loops: Vec<Loop>,
}

impl Summary {
    /// The innermost loop around the most matrix instructions or, if there are none, the most
    /// FMAs. Among equals the first, because what a product appends (its adapter) comes last.
    fn hot(&self) -> Option<usize> {
        let matrix = self.loops.iter().any(|it| it.own[0] > 0);
        let value = |at: &usize| self.loops[*at].own[usize::from(!matrix)];
        (0..self.loops.len())
            .filter(|at| value(at) > 0)
            .max_by_key(|at| (value(at), std::cmp::Reverse(self.loops[*at].head)))
    }

    /// Counts of the hot loop, or of the whole kernel if there is none.
    pub fn hot_counts(&self) -> &Counts {
        self.hot().map_or(&self.whole, |at| &self.loops[at].counts)
    }

    /// Counts of the loop that loads the hot loop's operands. This is the hot loop itself or, if
    /// another loop inside the same outer loop stages them, the innermost loop around it that
    /// loads from global memory.
    pub fn loading_counts(&self) -> &Counts {
        let mut at = self.hot();
        while let Some(index) = at {
            if !self.loops[index].counts.loads.is_empty() {
                return &self.loops[index].counts;
            }
            at = self.loops[index].around;
        }
        &self.whole
    }

    /// Whether this loop is the hot one.
    pub fn is_hot(&self, at: usize) -> bool {
        self.hot() == Some(at)
    }
}

impl Listing {
    pub fn summary(&self) -> Summary {
        let count = |blocks: &mut dyn Iterator<Item = usize>| {
            let mut counts = Counts::default();
            blocks.flat_map(|at| &self.blocks[at].instructions).for_each(|instruction| counts.add(instruction));
            counts
        };
        let found = self.natural_loops();
        let inside = |inner: usize, outer: usize| inner != outer && found[outer].1[found[inner].0];
        let size = |at: usize| found[at].1.iter().filter(|member| **member).count();
        let loops = (0..found.len()).map(|at| {
            let (head, members) = &found[at];
            let counts = count(&mut (0..members.len()).filter(|block| members[*block]));
            let own = |block: &usize| {
                members[*block] && !(0..found.len()).any(|other| inside(other, at) && found[other].1[*block])
            };
            let own = count(&mut (0..members.len()).filter(own));
            Loop {
                head: *head,
                blocks: size(at),
                counts,
                own: [own.of(Class::Matrix), own.of(Class::Fma)],
                around: (0..found.len()).filter(|other| inside(at, *other)).min_by_key(|other| size(*other)),
            }
        });
        Summary { whole: count(&mut (0..self.blocks.len())), loops: loops.collect() }
    }

    /// For each block that is jumped back to, the blocks of its loop; larger loops first.
    fn natural_loops(&self) -> Vec<(usize, Vec<bool>)> {
        let count = self.blocks.len();
        let mut before = vec![Vec::new(); count];
        for (at, block) in self.blocks.iter().enumerate() {
            block.next.iter().for_each(|next| before[*next].push(at));
        }
        let dominators = self.dominators(&before);
        let dominates = |head: usize, mut at: usize| loop {
            if at == head {
                return true;
            }
            match dominators[at] {
                Some(above) if above != at => at = above,
                _ => return false,
            }
        };
        let mut loops: BTreeMap<usize, Vec<bool>> = BTreeMap::new();
        for (at, block) in self.blocks.iter().enumerate() {
            for &head in block.next.iter().filter(|head| dominates(**head, at)) {
                let members = loops.entry(head).or_insert_with(|| vec![false; count]);
                members[head] = true;
                let mut open = vec![at];
                while let Some(at) = open.pop() {
                    if !std::mem::replace(&mut members[at], true) {
                        open.extend(&before[at]);
                    }
                }
            }
        }
        let mut loops: Vec<_> = loops.into_iter().collect();
        loops.sort_by_key(|(head, members)| (std::cmp::Reverse(members.iter().filter(|it| **it).count()), *head));
        loops
    }

    /// Immediate dominator of every reachable block (Cooper, Harvey and Kennedy's algorithm).
    fn dominators(&self, before: &[Vec<usize>]) -> Vec<Option<usize>> {
        let count = self.blocks.len();
        let mut found = vec![None; count];
        if count == 0 {
            return found;
        }
        // Reverse postorder.
        let (mut order, mut number, mut seen) = (Vec::new(), vec![0; count], vec![false; count]);
        let mut open = vec![(0, 0)];
        seen[0] = true;
        while let Some((at, next)) = open.pop() {
            if let Some(&to) = self.blocks[at].next.get(next) {
                open.push((at, next + 1));
                if !std::mem::replace(&mut seen[to], true) {
                    open.push((to, 0));
                }
            } else {
                order.push(at);
            }
        }
        order.reverse();
        order.iter().enumerate().for_each(|(place, at)| number[*at] = place);
        found[0] = Some(0);
        let mut changed = true;
        while changed {
            changed = false;
            for &at in &order[1..] {
                let mut known = before[at].iter().copied().filter(|it| found[*it].is_some());
                let first = known.next();
                let above = known.fold(first, |above, other| {
                    let (mut a, mut b) = (above?, other);
                    while a != b {
                        if number[a] > number[b] { a = found[a]? } else { b = found[b]? }
                    }
                    Some(a)
                });
                changed |= found[at] != above;
                found[at] = above;
            }
        }
        found
    }
}
