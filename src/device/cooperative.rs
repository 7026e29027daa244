//! Cooperative matrices: a whole subgroup multiplies small matrices, for which hardware has
//! special units. This module finds out whether a GPU has the ones that the kernels need.

use wgpu::CooperativeScalarType as Scalar;

use super::shader::Defines;

/// The cooperative matrices that a device's kernels use, and the subgroups that hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cooperative {
    /// Rows and columns of a matrix: 16 or 8.
    pub edge: u32,
    /// Invocations per subgroup.
    pub lanes: u32,
    /// Whether matrices can be loaded from arrays of vectors: on Vulkan, but not on Metal.
    pub vectors: bool,
}

impl Cooperative {
    /// One for each size, with the subgroup sizes that drivers combine with it; for the registry
    /// test.
    pub(crate) const ALL: [Cooperative; 4] = [
        Cooperative { edge: 8, lanes: 8, vectors: true },
        Cooperative { edge: 8, lanes: 32, vectors: false },
        Cooperative { edge: 16, lanes: 32, vectors: true },
        Cooperative { edge: 16, lanes: 64, vectors: true },
    ];

    /// Adds the text constants of `shaders/shared/coop.wgsl`.
    pub(crate) fn defines(self, defines: Defines) -> Defines {
        defines.with("edge", self.edge).with("lanes", self.lanes).with("vectors", self.vectors)
    }

    /// Lists the square f16 matrices whose products are summed in f32, larger ones first, with
    /// each subgroup size that the GPU may use for them. The actual size is only known once a
    /// pipeline is compiled; most drivers take their largest.
    pub(super) fn candidates(adapter: &wgpu::Adapter) -> Vec<Cooperative> {
        let info = adapter.get_info();
        let sizes = [info.subgroup_min_size, info.subgroup_max_size];
        let threads = adapter.limits().max_compute_invocations_per_workgroup;
        let vectors = info.backend == wgpu::Backend::Vulkan;
        Cooperative::among(&adapter.cooperative_matrix_properties(), sizes, threads, vectors)
    }

    fn among(
        shapes: &[wgpu::CooperativeMatrixProperties],
        [min_lanes, max_lanes]: [u32; 2],
        max_threads: u32,
        vectors: bool,
    ) -> Vec<Cooperative> {
        let has = |edge: &u32| {
            shapes.iter().any(|shape| {
                [shape.m_size, shape.n_size, shape.k_size] == [*edge; 3]
                    && (shape.ab_type, shape.cr_type) == (Scalar::F16, Scalar::F32)
            })
        };
        let fits = |lanes: &u32| (min_lanes..=max_lanes).contains(lanes) && SUBGROUPS * lanes <= max_threads;
        let edge = [16, 8].into_iter().find(has);
        edge.into_iter()
            .flat_map(|edge| LANES.into_iter().filter(fits).map(move |lanes| Cooperative { edge, lanes, vectors }))
            .collect()
    }
}

/// Subgroup sizes that the kernels can be compiled for, largest first.
const LANES: [u32; 4] = [64, 32, 16, 8];
/// Minimum subgroups per workgroup.
const SUBGROUPS: u32 = 4;

/// Filters features for the choice of a tier: cooperative matrices count only if they are the ones
/// that the kernels need.
pub(super) fn usable(mut features: wgpu::Features, cooperative: bool) -> wgpu::Features {
    if !cooperative {
        features.remove(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(sizes: [u32; 3], ab_type: Scalar, cr_type: Scalar) -> wgpu::CooperativeMatrixProperties {
        let [m_size, n_size, k_size] = sizes;
        wgpu::CooperativeMatrixProperties { m_size, n_size, k_size, ab_type, cr_type, saturating_accumulation: false }
    }

    #[test]
    fn the_larger_square_shape_is_taken_and_others_are_not() {
        let small = shape([8; 3], Scalar::F16, Scalar::F32);
        let large = shape([16; 3], Scalar::F16, Scalar::F32);
        let found = |shapes: &[_], lanes, threads| -> Vec<_> {
            Cooperative::among(shapes, lanes, threads, true).iter().map(|found| (found.edge, found.lanes)).collect()
        };
        assert_eq!(found(&[small], [8, 8], 1024), [(8, 8)]);
        assert_eq!(found(&[small, large], [32, 32], 1024), [(16, 32)]);
        // RDNA, and Metal as wgpu reports it.
        assert_eq!(found(&[large], [32, 64], 1024), [(16, 64), (16, 32)]);
        assert_eq!(found(&[small], [4, 64], 1024), [(8, 64), (8, 32), (8, 16), (8, 8)]);
        assert_eq!(found(&[large], [32, 64], 128), [(16, 32)]);
        assert_eq!(found(&[large], [0, 0], 1024), []);
        let others = [
            shape([16, 8, 16], Scalar::F16, Scalar::F32),
            shape([16; 3], Scalar::F16, Scalar::F16),
            shape([8; 3], Scalar::F32, Scalar::F32),
        ];
        assert_eq!(found(&others, [32, 32], 1024), []);
    }
}
