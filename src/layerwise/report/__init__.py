"""Pictures and pages; computes nothing."""
