"""The methods by name. A new one is a file of this folder and a line here."""

from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.methods.picard import Picard
from nodepint_mpi.parallel.methods.reduced import Reduced
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.parallel.methods.tangent import Tangent

METHODS: dict[str, type[AbstractMethod]] = {
    "parareal": Parareal,
    "tangent": Tangent,
    "reduced": Reduced,
    "picard": Picard,
    "serial": Serial,
}
