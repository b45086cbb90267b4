"""The path through machine code that is written by hand, as cuobjdump prints it."""

import sass

# Two rows of a number a thread, by Triton: predicated loads, a loop of two loads a round, and a branch past all.
LOOP = """
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
                                                                                      /* 0x00000a00ff017b82 */
        /*0010*/               @P0 BRA 0xa0 ;
        /*0020*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FADD R12, R4, R12 ;
        /*0050*/                   FMNMX R13, R8, R13, !PT ;
        /*0060*/                   MUFU.EX2 R14, R13 ;
        /*0070*/              @!P1 STG.E desc[UR4][R16.64], R14 ;
        /*0080*/               @P2 BRA 0x20 ;
        /*0090*/                   STG.E desc[UR4][R16.64], R12 ;
        /*00a0*/                   EXIT ;
		..........
"""

# Threads past the end leave before the last store.
EXITS = """
		Function : kernel
        /*0000*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 STG.E.128 desc[UR4][R16.64], R4 ;
        /*0020*/               @P0 EXIT ;
        /*0030*/                   STG.E.128 desc[UR4][R18.64], R4 ;
        /*0040*/                   EXIT ;
"""


def test_the_path_goes_over_the_widest_load_and_store() -> None:
    (code,) = sass.kernels(LOOP).values()
    assert sass.path(code) == sass.Path(instructions=11, alu=1, special=1, loaded=32, stored=8, flight=32)


def test_of_a_loop_one_round_counts() -> None:
    (code,) = sass.kernels(LOOP).values()
    assert sass.path(code, walks=True) == sass.Path(instructions=7, alu=1, special=1, loaded=32, stored=4, flight=32)


def test_the_path_goes_over_all_stores_that_it_can() -> None:
    (code,) = sass.kernels(EXITS).values()
    assert [sass.path(code).stored, sass.path(code, stores=None).stored] == [16, 32]
