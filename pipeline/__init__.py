"""The library of the Moonlight training system. Imports nothing from `data_prep` or `jobs`."""
