//! The scalar of CPU twins.

/// The scalar of a CPU twin: f32 like the kernels, f64 for finite differences.
pub trait Real:
    num_traits::Float + num_traits::FromPrimitive + std::iter::Sum + std::ops::AddAssign + Send + Sync
{
    /// Converts a stored f32.
    fn of(value: f32) -> Self;
}

impl Real for f32 {
    fn of(value: f32) -> f32 {
        value
    }
}

impl Real for f64 {
    fn of(value: f32) -> f64 {
        f64::from(value)
    }
}
