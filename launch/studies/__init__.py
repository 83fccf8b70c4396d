"""Studies: several starts, evaluated or trained over several seeds, and what is written of them."""
