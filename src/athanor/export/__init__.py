"""What leaves the house: the fused model in other programs' formats."""
