"""Loops around the line from workload to policy: questions that take more than one plan, or a program of their own."""
