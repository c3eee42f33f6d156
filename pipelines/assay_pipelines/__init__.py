"""The jobs: data → features → search → training → evaluation → gate → registry, and the `assay` command."""
