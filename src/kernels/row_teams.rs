//! How the kernels that reduce rows share them out: a team of threads a row; `shaders/shared/row_teams.wgsl`.

use crate::device::{Defines, Tier};

/// Teams of a workgroup.
#[derive(Clone, Copy)]
pub(super) struct RowTeams {
    threads: u32,
    /// Threads a team, where it is no subgroup.
    team: u32,
    /// Rows a workgroup.
    rows: u32,
    subgroups: bool,
}

/// Software drivers: a row an invocation, no barriers.
const SOFTWARE: RowTeams = RowTeams { threads: 8, team: 1, rows: 8, subgroups: false };

impl RowTeams {
    /// For rows of up to some thousand values.
    pub fn short(tier: Tier) -> RowTeams {
        match tier {
            Tier::Software => SOFTWARE,
            _ => RowTeams { threads: 64, team: 32, rows: 4, subgroups: tier.subgroups() },
        }
    }

    /// For long rows: a workgroup each.
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

    /// The same for kernels that read rows by `shaders/shared/rows.wgsl`.
    pub fn row_defines(self, ragged: bool) -> Defines {
        self.defines().with("ragged", ragged)
    }

    /// Rows a workgroup.
    pub fn group_rows(self) -> u64 {
        self.rows.into()
    }

    /// Workgroups for so many rows.
    pub fn groups(self, rows: usize) -> u64 {
        (rows as u64).div_ceil(self.group_rows())
    }
}

/// Whether rows of `k` values must be read value by value: they do not end at whole quads.
pub(super) fn is_ragged(k: usize) -> bool {
    !k.is_multiple_of(4)
}
