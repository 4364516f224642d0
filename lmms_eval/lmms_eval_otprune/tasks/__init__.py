"""The eleven benchmarks of the OTPrune table (group ``otprune_paper``), and the embedded ones (``otprune_mini``)."""
