"""Print how the code imports itself: circles between modules, and floors of rooms.

    uv run python scripts/imports.py

A room is a package of src/athanor or a flat module. A floor is a step of the longest chain of
imports, between rooms or between modules. Imports inside functions count. Exits with 1 if there is
a circle, or more than 8 floors of rooms or 12 of modules.
"""

import sys
from graphlib import CycleError, TopologicalSorter

from athanor.code import read_imports, room

MOST_FLOORS, MOST_OF_MODULES = 8, 12

Graph = dict[str, set[str]]


def between_rooms(modules: Graph) -> Graph:
    """Return the imports between rooms: athanor.train.build is in the room train."""
    rooms: Graph = {}
    for module, imported in modules.items():
        rooms.setdefault(room(module), set()).update(map(room, imported))
    return {name: others - {name} for name, others in rooms.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Return circles of imports, one for each round in which one is left."""
    graph, result = dict(graph), []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            result.append(circle)
            graph[circle[1]] = graph[circle[1]] - {circle[0]}
        else:
            return result


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of each room or module, from 1; it is above all that it imports."""
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = 1 + max((floor[other] for other in graph[name]), default=0)
    return floor


def main() -> None:
    """Print the circles and the floors."""
    modules = read_imports()
    between, rooms = circles(modules), between_rooms(modules)
    print(f"circles between modules: {len(between)}")
    for circle in between:
        print("  " + " -> ".join(circle))
    if between_rooms_circles := circles(rooms):
        print(f"circles between rooms: {len(between_rooms_circles)}")
        for circle in between_rooms_circles:
            print("  " + " -> ".join(circle))
        sys.exit(1)
    floor = floors(rooms)
    print(f"floors: {max(floor.values())}")
    for number in range(1, max(floor.values()) + 1):
        print(f"  {number}: " + ", ".join(sorted(name for name in floor if floor[name] == number)))
    if between:
        sys.exit(1)
    highest = max(floors(modules).values())
    print(f"floors of modules: {highest}")
    sys.exit(max(floor.values()) > MOST_FLOORS or highest > MOST_OF_MODULES)


if __name__ == "__main__":
    main()
