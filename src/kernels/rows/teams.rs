//! Distributes the rows of reducing kernels to threads: a team of threads per row;
//! `shaders/shared/row_teams.wgsl`.

use crate::device::{Defines, Tier};

/// The teams of a workgroup.
#[derive(Clone, Copy)]
pub(crate) struct RowTeams {
    threads: u32,
    /// Threads per team, if it isn't a subgroup.
    team: u32,
    /// Rows per workgroup.
    rows: u32,
    subgroups: bool,
}

/// Software drivers: one row per invocation, no barriers.
const SOFTWARE: RowTeams = RowTeams { threads: 8, team: 1, rows: 8, subgroups: false };

impl RowTeams {
    /// For rows of up to a few thousand values.
    pub fn short(tier: Tier) -> RowTeams {
        match tier {
            Tier::Software => SOFTWARE,
            _ => RowTeams { threads: 64, team: 32, rows: 4, subgroups: tier.subgroups() },
        }
    }

    /// For long rows: one workgroup per row.
    pub fn long(tier: Tier) -> RowTeams {
        match tier {
            Tier::Software => SOFTWARE,
            _ => RowTeams { threads: 256, team: 256, rows: 1, subgroups: false },
        }
    }

    /// Text constants.
    pub fn defines(self) -> Defines {
        Defines::new()
            .with("threads", self.threads)
            .with("team", self.team)
            .with("group_rows", self.rows)
            .with("subgroups", self.subgroups)
    }

    /// The same, for kernels that read rows through `shaders/shared/row_quads.wgsl`.
    pub fn row_defines(self, ragged: bool) -> Defines {
        self.defines().with("ragged", ragged)
    }

    /// Rows per workgroup.
    pub fn group_rows(self) -> u64 {
        self.rows.into()
    }

    /// Workgroups for this many rows.
    pub fn groups(self, rows: usize) -> u64 {
        (rows as u64).div_ceil(self.group_rows())
    }
}

/// Whether rows of `k` values must be read value by value, because `k` is not a multiple of 4.
pub(crate) fn is_ragged(k: usize) -> bool {
    !k.is_multiple_of(4)
}
