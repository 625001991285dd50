"""How long a step would take on other ranks: measured costs, a network, simulated clocks."""
