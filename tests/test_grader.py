"""The grader: every rule of grade's docstring as cases, the benchmarks' own golds, hostile input, and the workers' life and death."""
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common as module
from common import extract_answer, gold_is_gradable, grade, grade_batch, grader_counts

HERE = Path(module.__file__).resolve().parent


def shared(name: str) -> list[dict]:
    """Rows of a file in <repo>/../shared; the test is skipped where there is none."""
    path = HERE.parent / "shared" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def boxed(answer: str) -> str:
    return f"Adding up, we get\n\\[\\boxed{{{answer}}}\\]"


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


# An answer, two tildes, a gold; pairs apart by two semicolons. These are right ...
RIGHT = r"""
42.  ~~  42  ;;  42\,000  ~~  42000  ;;  42 000  ~~  42000  ;;  42,000  ~~  42000  ;;  42{,}000  ~~  42\,000  ;;  \varnothing  ~~  \emptyset
\{\}  ~~  \emptyset  ;;  \emptyset  ~~  \varnothing  ;;  62.5 \text{ percent}  ~~  62.5\%  ;;  62.5\%  ~~  62.5 \text{ percent}  ;;  62.5  ~~  62.5\%
62.5\%  ~~  62.5  ;;  0.625  ~~  62.5\%  ;;  62.5\%  ~~  \frac58  ;;  4.5 \times 10^{33}  ~~  4.5e33  ;;  4.5e33  ~~  4.5e33
4.5\cdot10^{33}  ~~  4.5e33  ;;  4500000000000000000000000000000000  ~~  4.5e33  ;;  45 \times 10^{32}  ~~  4.5e33
4.5 \times 10^{33} \text{ erg/s}  ~~  4.5e33  ;;  6.02*10^23  ~~  6.02e23  ;;  10^{-5}  ~~  1e-5  ;;  1e-5  ~~  0.00001  ;;  x \in [-2,7]  ~~  [-2,7]
[-2,7]  ~~  x \in [-2,7]  ;;  -2 \le x \le 7  ~~  x \in [-2,7]  ;;  -2 \leq x \leq 7  ~~  [-2,7]  ;;  x > 2  ~~  (2,\infty)
(2,+\infty)  ~~  (2,\infty)  ;;  (2,\infty)  ~~  x>2  ;;  x = 3 \text{ or } x = 5  ~~  3,5  ;;  x = 3 or x = 5  ~~  3, 5
3 \text{ and } 5  ~~  3,5  ;;  5, 3  ~~  3,5  ;;  \{3,5\}  ~~  3, 5  ;;  x=3, x=5  ~~  3,5  ;;  x \in \{3, 5\}  ~~  3,5
\dfrac{1}{2}  ~~  \frac12  ;;  \frac{1}2  ~~  \frac12  ;;  \tfrac12  ~~  \frac{1}{2}  ;;  1/2  ~~  \frac12  ;;  0.5  ~~  \frac12  ;;  .5  ~~  \frac12
\frac{2}{4}  ~~  \frac12  ;;  -\frac{1}{2}  ~~  \frac{-1}{2}  ;;  \frac{1}{-2}  ~~  -\frac12  ;;  -1/2  ~~  -\frac{1}{2}
864 \text{ in}^2  ~~  864 \mbox{ inches}^2  ;;  864 \text{ square inches}  ~~  864 \mbox{ inches}^2  ;;  864  ~~  864 \mbox{ inches}^2
15 cm^2  ~~  15\mbox{ cm}^2  ;;  15 \text{ cm}^2  ~~  15\mbox{ cm}^2  ;;  15 \text{ cm²}  ~~  15\mbox{ cm}^2  ;;  \$18.90  ~~  18.90
18.9  ~~  \$18.90  ;;  $18.90  ~~  \$18.90  ;;  18.90 \text{ dollars}  ~~  \$18.90  ;;  \$32,348  ~~  \$32,\!348  ;;  32348  ~~  \$32,\!348
\$32348.00  ~~  \$32,\!348  ;;  5.4  ~~  5.4 \text{ cents}  ;;  5.4 \text{ cents}  ~~  5.4 \text{ cents}  ;;  5.4 cents  ~~  5.4 \text{ cents}
90  ~~  90^\circ  ;;  90^{\circ}  ~~  90^\circ  ;;  90 \text{ degrees}  ~~  90^\circ  ;;  90°  ~~  90  ;;  90\degree  ~~  90^\circ
\angle ABC = 90^\circ  ~~  90^\circ  ;;  \frac{270}{7}  ~~  \frac{270}7\text{ degrees}  ;;  \frac{270}{7}^\circ  ~~  \frac{270}7\text{ degrees}
\left(\frac{270}{7}\right)^\circ  ~~  \frac{270}7\text{ degrees}  ;;  38\frac{4}{7}  ~~  \frac{270}7\text{ degrees}  ;;  \text{Yes}  ~~  yes
yes  ~~  \text{Yes}  ;;  YES  ~~  Yes  ;;  \textbf{Yes}  ~~  \text{Yes}  ;;  No.  ~~  No  ;;  \text{no solution}  ~~  No solution  ;;  3:30  ~~  3:30
3:30 \text{ PM}  ~~  3:30 \text{ p.m.}  ;;  3{:}30  ~~  3:30  ;;  \frac{\pi}{2}  ~~  \frac{\pi}2  ;;  \pi/2  ~~  \frac{\pi}{2}
0.5\pi  ~~  \frac{\pi}{2}  ;;  \dfrac{1}{2}\pi  ~~  \frac{\pi}{2}  ;;  \frac{\cos x}{\sin x}  ~~  \cot x  ;;  \sin 30^\circ  ~~  \frac12
\frac{1}{\tan x}  ~~  \cot x  ;;  1-\cos^2 x  ~~  \sin^2 x  ;;  \sin(2x)  ~~  2\sin x\cos x  ;;  2\ln 3  ~~  \ln 9  ;;  \ln(9)  ~~  2 \ln 3
\log_2 8  ~~  3  ;;  \log_{2} 8  ~~  3  ;;  \frac{\ln 5}{\ln 2}  ~~  \log_2 5  ;;  \binom{10}{3}  ~~  120  ;;  10!  ~~  3628800  ;;  2^{10}  ~~  1024
2^10  ~~  1024  ;;  3+4  ~~  7  ;;  \frac{1}{2}+\frac{1}{3}  ~~  \frac56  ;;  (2, 4)  ~~  (2,4)  ;;  \left( 2 , 4 \right)  ~~  (2,4)
(-\infty, 2) \cup (3, \infty)  ~~  x<2 \text{ or } x>3  ;;  (3,\infty)\cup(-\infty,2)  ~~  (-\infty, 2) \cup (3, \infty)
(-\infty,0)\cup[0,3)  ~~  (-\infty,3)  ;;  \mathbb{R}  ~~  (-\infty,\infty)  ;;  (-\infty,\infty)  ~~  \mathbb{R}
\mathbb{R} \setminus \{-3\}  ~~  (-\infty,-3) \cup (-3,\infty)  ;;  \begin{bmatrix} 1\\2 \end{bmatrix}  ~~  \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix} \frac{1}{5} \\ -\frac{18}{5} \end{pmatrix}  ~~  \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}  ~~  \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]  ~~  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)  ~~  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\left[\begin{matrix} 1 & 2 \\ 3 & 4 \end{matrix}\right]  ~~  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ;;  2x+3 = y  ~~  y = 2x+3
y = 3+2x  ~~  y = 2x+3  ;;  2x+3  ~~  y = 2x+3  ;;  y=2x+3  ~~  2x+3  ;;  2x - y + 3 = 0  ~~  y = 2x+3
10x-14y+22z+8=0  ~~  5x - 7y + 11z + 4 = 0  ;;  5x+11z = 7y-4  ~~  5x - 7y + 11z + 4 = 0  ;;  (x+1)^2+(y-2)^2=9  ~~  (x+1)^2 + (y-2)^2 = 9
x^2+2x+1+y^2-4y+4=9  ~~  (x+1)^2 + (y-2)^2 = 9  ;;  f(x) = x^2+1  ~~  x^2+1  ;;  f(x) = x^2+1  ~~  f(x) = 1+x^2  ;;  x^2+1  ~~  f(x)=x^2+1
ab+2a+5b+10  ~~  (a+5)(b+2)  ;;  (b+2)(a+5)  ~~  (a+5)(b+2)  ;;  \frac{9a+11}{20}  ~~  \frac{11+9a}{20}
\frac{11}{20}+\frac{9a}{20}  ~~  \frac{11+9a}{20}  ;;  123456789012345678901234567890  ~~  123456789012345678901234567890
123,456,789,012,345,678,901,234,567,890  ~~  123456789012345678901234567890  ;;  [1,2]  ~~  [1, 2]  ;;  ['4', '3']  ~~  ['3', '4']
3, 4  ~~  ['3', '4']  ;;  \frac12  ~~  1/2  ;;  \sqrt{2}  ~~  sqrt(2)  ;;  \sqrt2  ~~  sqrt(2)  ;;  2x^2  ~~  2*x**2  ;;  2x^{2}  ~~  2*x**2
x^{-1}  ~~  x**-1  ;;  42  ~~  $42$  ;;  42  ~~  \(42\)  ;;  42  ~~  \[42\]  ;;  42  ~~  \boxed{42}  ;;  42  ~~  $\boxed{42}$  ;;  $42$  ~~  42
\(42\)  ~~  42  ;;  \text{42}  ~~  42  ;;  {42}  ~~  42  ;;  (42)  ~~  42  ;;  \mathbf{42}  ~~  42  ;;  1 \pm \sqrt{19}  ~~  1-\sqrt{19}, 1+\sqrt{19}
1+\sqrt{19}, 1-\sqrt{19}  ~~  1 \pm \sqrt{19}  ;;  1 + \sqrt{19} \text{ and } 1 - \sqrt{19}  ~~  1 \pm \sqrt{19}
x = 1 \pm \sqrt{19}  ~~  1 \pm \sqrt{19}  ;;  \pm 2  ~~  2,-2  ;;  -2, 2  ~~  \pm 2  ;;  -2, 1+\sqrt5, 1-\sqrt5  ~~  \{1\pm\sqrt{5},-2\}
1+\sqrt{5},1-\sqrt{5},-2  ~~  \{1\pm\sqrt{5},-2\}  ;;  52_8  ~~  52_{8}  ;;  52_{8}  ~~  52_8  ;;  (52)_8  ~~  52_8  ;;  \text{(B)}  ~~  B
(B)  ~~  B  ;;  B  ~~  (B)  ;;  b  ~~  B  ;;  \textbf{(B)}  ~~  \text{(B)}  ;;  \textbf{B}  ~~  B  ;;  \text{B}  ~~  \text{(B)}
(B) 36  ~~  \text{(B)}  ;;  \text{(B) } 36  ~~  B  ;;  B.  ~~  B  ;;  \text{Option B}  ~~  B  ;;  i+1  ~~  1+i  ;;  (1+i)^2  ~~  2i
7 - 3i  ~~  -3i+7  ;;  2i\sqrt{3}  ~~  2\sqrt{3}i  ;;  \sqrt{-4}  ~~  2i  ;;  1\frac{4}{5}  ~~  \frac95  ;;  1.8  ~~  1\frac{4}{5}
9/5  ~~  1\frac{4}{5}  ;;  1 4/5  ~~  1\frac{4}{5}  ;;  137.5  ~~  137 \frac{1}{2}  ;;  \frac{275}{2}  ~~  137 \frac{1}{2}
-1\frac12  ~~  -\frac32  ;;  3, \frac{1}{2}  ~~  \frac12,3  ;;  (1,2),(3,4)  ~~  (3,4),(1,2)  ;;  \{(1,2),(3,4)\}  ~~  (1,2),(3,4)
\frac{\sqrt{3}}{3}  ~~  \frac{1}{\sqrt{3}}  ;;  \frac{1}{\sqrt{3}}  ~~  \frac{\sqrt{3}}{3}  ;;  \sqrt[3]{8}  ~~  2  ;;  2^{1/2}  ~~  \sqrt2
\sqrt{\frac{1}{2}}  ~~  \frac{\sqrt2}{2}  ;;  0.\overline{3}  ~~  \frac13  ;;  0.1\overline{6}  ~~  \frac16  ;;  \infty  ~~  +\infty
-\infty  ~~  -\infty  ;;  k = 19  ~~  19  ;;  x = 5  ~~  x=5  ;;  5  ~~  x=5  ;;  n=19  ~~  19  ;;  S = 2\pi  ~~  2\pi
A = \pi r^2 = 9\pi  ~~  9\pi  ;;  x^2+y^2 = 13  ~~  13  ;;  2\pi \approx 6.28  ~~  2\pi  ;;  P(A) = \frac{1}{2}  ~~  \frac12  ;;  f(2) = 5  ~~  5
|x|  ~~  |x|  ;;  |z| = 5  ~~  5  ;;  \text{Area} = 12  ~~  12  ;;  \text{ Tuesday }  ~~  Tuesday  ;;  \text{tuesday}  ~~  Tuesday
\text{x-axis}  ~~  x-axis  ;;  \text{east}  ~~  East  ;;  10 \text{ and } 20  ~~  10, 20  ;;  3:2  ~~  3:2  ;;  3 : 2  ~~  3:2
48 \text{ km/h}  ~~  48 \text{ kilometers per hour}  ;;  48 \text{ kph}  ~~  48 \text{ km/h}  ;;  12  ~~  12 \text{ apples}
12 \text{ apples}  ~~  12  ;;  12 \text{ units}  ~~  12  ;;  12\text{ square units}  ~~  12  ;;  12\text{ cm}  ~~  12  ;;  12\,\text{cm}  ~~  12
12~\mathrm{cm}  ~~  12 \text{ cm}  ;;  10\text{ m/s}^2  ~~  10  ;;  60 \text{ mph}  ~~  60  ;;  3 \text{ hours}  ~~  3  ;;  50\%  ~~  0.5
50\%  ~~  \frac12  ;;  2 \times 3  ~~  6  ;;  \left\{ 1, 2 \right\}  ~~  1,2  ;;  \left[0, 1\right]  ~~  [0,1]
[0,1]\cup[2,3]  ~~  [2,3]\cup[0,1]  ;;  0 \le x < 1  ~~  [0,1)  ;;  \lfloor x \rfloor  ~~  \lfloor x \rfloor  ;;  \lfloor 7/2 \rfloor  ~~  3
e^{2x}  ~~  (e^x)^2  ;;  \exp(2)  ~~  e^2  ;;  n(n+1)/2  ~~  \frac{n(n+1)}{2}  ;;  \frac{n^2+n}{2}  ~~  \frac{n(n+1)}{2}
\frac{1}{2}n(n+1)  ~~  \frac{n(n+1)}{2}  ;;  2^{n+1}  ~~  2 \cdot 2^n  ;;  -13x + 3  ~~  3-13x  ;;  5r^{5}  ~~  5r^5
\left( 3, \frac{\pi}{2} \right)  ~~  (3, \pi/2)  ;;  q - p  ~~  -p+q  ;;  -(p-q)  ~~  q-p  ;;  x^2 \cdot y  ~~  yx^2  ;;  a_1 + a_2  ~~  a_2+a_1
.0000672  ~~  0.0000672  ;;  6.72 \times 10^{-5}  ~~  .0000672  ;;  0.15  ~~  .150  ;;  27  ~~  27.0  ;;  27.0  ~~  27  ;;  +5  ~~  5  ;;  −5  ~~  -5
1,\!234  ~~  1234  ;;  1\,234\,567  ~~  1,234,567  ;;  \text{(A), (C)}  ~~  A, C  ;;  A,C  ~~  A, C  ;;  x \neq 3  ~~  x \ne 3
\frac{x+1}{x-1}  ~~  \frac{-x-1}{1-x}  ;;  \sqrt{x^2+1}  ~~  (x^2+1)^{1/2}  ;;  \frac{\sqrt{21}}{5}  ~~  \frac{1}{5}\sqrt{21}
\arctan 2  ~~  \tan^{-1} 2  ;;  \theta = \frac{\pi}{4}  ~~  \frac{\pi}{4}  ;;  y = -2x  ~~  y=-2x  ;;  (x,y) = (1,2)  ~~  (1,2)  ;;  \boxed{5}  ~~  5
x=\boxed{5}  ~~  5  ;;  0.333333...  ~~  0.333333...  ;;  120^\circ, 60^\circ  ~~  60^\circ, 120^\circ  ;;  36\pi \text{ cm}^3  ~~  36\pi
36\pi  ~~  36\pi \text{ cubic centimeters}  ;;  36\pi \text{ cm}^3  ~~  36\pi \text{ cubic centimeters}  ;;  \sqrt{2} \text{ m}  ~~  \sqrt{2}
100 \text{ sq. ft.}  ~~  100 \text{ ft}^2  ;;  3x^2y  ~~  3x^2 y  ;;  \frac{3}{4} \text{ cup}  ~~  \frac34  ;;  5^{\text{th}}  ~~  5  ;;  1st  ~~  1
-\frac{35}{9}  ~~  \frac{-35}{9}  ;;  \frac{-35}{9}  ~~  -\frac{35}{9}  ;;  \frac{1}{2} \cdot \pi  ~~  \frac{\pi}{2}  ;;  \ln{2}  ~~  \ln 2
\log 100  ~~  2  ;;  \frac{a}{b}  ~~  a/b  ;;  \left|x-3\right|  ~~  |x-3|  ;;  18+2\pi  ~~  2(9+\pi)  ;;  (-1, 6)  ~~  -1<x<6
\frac{2}{\sqrt{2}}  ~~  \sqrt{2}  ;;  \frac{1+\sqrt5}{2}  ~~  \frac12+\frac{\sqrt5}{2}  ;;  \frac{20000}{\pi}  ~~  20000/\pi
6r^2-4r-24  ~~  2(3r^2-2r-12)  ;;  2x \cdot 3  ~~  6x  ;;  \sin^2 x + \cos^2 x  ~~  1  ;;  5 \text{ (units)}  ~~  5  ;;  \text{\$}7.25  ~~  7.25
7.25 USD  ~~  7.25  ;;  60 \text{ minutes}  ~~  60 \text{ min}
\begin{pmatrix}1&0\\0&1\end{pmatrix}  ~~  \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}  ;;  (1,\!000)  ~~  1000  ;;  \{-1, 0, 1\}  ~~  -1,0,1
x \in (2,\infty)  ~~  x>2  ;;  m = 5, n = 3  ~~  m=5,n=3  ;;  \frac{5}{8}  ~~  0.625  ;;  0.6250  ~~  \frac58  ;;  \$ 7.25  ~~  7.25
7.25\text{ dollars}  ~~  \$7.25  ;;  \pounds 5  ~~  5  ;;  €5  ~~  5  ;;  £5  ~~  5  ;;  35 percent  ~~  35\%  ;;  35%  ~~  35\%  ;;  35 \%  ~~  35
k=19.  ~~  19  ;;  \mathbf{k} = 19  ~~  19  ;;  \overline{AB} = 5  ~~  5  ;;  AB = 5  ~~  5  ;;  \angle A = 30^\circ  ~~  30
x_1 = 3, x_2 = 5  ~~  3,5  ;;  x = -4 \text{ or } x = 9  ~~  -4, 9  ;;  x=-4,\ 9  ~~  -4,9  ;;  -4 \text{ and } 9  ~~  -4,9
\left\{-4,9\right\}  ~~  -4,9  ;;  -4; 9  ~~  -4,9  ;;  2-\sqrt7 , 2+\sqrt7  ~~  2 \pm \sqrt7  ;;  \langle 8,-1,5 \rangle  ~~  (8,-1,5)
( 8 , -1 , 5 )  ~~  (8,-1,5)  ;;  \left(8,-1,\frac{10}{2}\right)  ~~  (8,-1,5)  ;;  \left[-6, 1/3\right)  ~~  [-6,\frac13)
-6 \leq x < \frac13  ~~  [-6,\frac13)  ;;  x\in[-6,\tfrac13)  ~~  [-6,\frac13)
(-\infty, -3) \bigcup (-3, \infty)  ~~  (-\infty,-3) \cup (-3, \infty)
\left(-\infty,-3\right)\cup\left(-3,\infty\right)  ~~  (-\infty,-3) \cup (-3, \infty)  ;;  \sqrt{9 \cdot 5}  ~~  3\sqrt5
3 \cdot \sqrt{5}  ~~  3\sqrt5  ;;  45^{1/2}  ~~  3\sqrt5  ;;  3\sqrt{5}\text{ units}  ~~  3\sqrt5  ;;  -4 + 9 \pi  ~~  9\pi-4
7+3\mathrm{i}  ~~  7+3i  ;;  7 + 3 \cdot i  ~~  7+3i  ;;  7+3\imath  ~~  7+3i  ;;  x^{2}-3x-4  ~~  x^2-3x-4  ;;  -4-3x+x^2  ~~  x^2-3x-4
x^2 - 3x - 4 = 0  ~~  x^2-3x-4=0  ;;  p(x) = x^2-3x-4  ~~  x^2-3x-4
\begin{bmatrix}2&7\\1&8\end{bmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}
\begin{pmatrix} 2 & 7 \\[2mm] 1 & 8 \end{pmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}
\begin{pmatrix} 2 & 7 \cr 1 & 8 \end{pmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}
A = \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}
\begin{pmatrix} 2 & 7 \\ 1 & 8 \\ \end{pmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}  ;;  y + 4x = 7  ~~  y=-4x+7
4x+y-7=0  ~~  y=-4x+7  ;;  7-4x  ~~  y=-4x+7  ;;  6.02 \cdot 10^{23}  ~~  6.02e23  ;;  6.02E23  ~~  6.02e23  ;;  6.02e+23  ~~  6.02e23
602000000000000000000000  ~~  6.02e23  ;;  6.02 × 10^{23}  ~~  6.02e23  ;;  6.02 \times 10^{23} \text{ molecules}  ~~  6.02e23
1203_{\text{4}}  ~~  1203_4  ;;  (1203)_{4}  ~~  1203_4  ;;  \text{1203}_4  ~~  1203_4  ;;  61  ~~  061  ;;  061  ~~  61
\text{Evelyn.}  ~~  \text{Evelyn}  ;;  Evelyn  ~~  \text{Evelyn}  ;;  \textbf{Evelyn}  ~~  \text{Evelyn}  ;;  \mathrm{Evelyn}  ~~  \text{Evelyn}
\text{ellipse}  ~~  \text{Ellipse}  ;;  \text{an ellipse}  ~~  \text{an ellipse}  ;;  \text{(C)}  ~~  C  ;;  C)  ~~  C  ;;  \boxed{C}  ~~  \text{(C)}
\mathrm{(C)}  ~~  \text{(C)}  ;;  \textbf{(C) }12  ~~  C  ;;  \text{C}  ~~  (C)  ;;  \mathbb{R}  ~~  \mathbb R
\text{all real numbers}  ~~  \text{all real numbers}  ;;  2^3 \cdot 3  ~~  24  ;;  \frac{10!}{2!8!}  ~~  45
\left(\frac{1}{2}\right)^3  ~~  \frac18  ;;  \frac{1}{2^3}  ~~  \frac18  ;;  \sqrt{\pi}  ~~  \pi^{1/2}  ;;  \sin\frac{\pi}{6}  ~~  \frac12
\tan^{-1}(1)  ~~  \frac{\pi}{4}  ;;  \arccos(0)  ~~  \pi/2  ;;  e^{i\pi}  ~~  -1  ;;  \cos\theta + i\sin\theta  ~~  e^{i\theta}
\log_{10} 2  ~~  \log 2  ;;  \log(100)  ~~  2  ;;  \frac{\ln 8}{\ln 2}  ~~  3  ;;  |{-3}|  ~~  3  ;;  a^2 - b^2  ~~  (a-b)(a+b)
\frac{x^2-1}{x-1}  ~~  x+1  ;;  n!  ~~  n!  ;;  (n+1)!  ~~  (n+1)!  ;;  \binom{n}{2}  ~~  \binom{n}{2}  ;;  \binom{n}{2}  ~~  \frac{n(n-1)}{2}
x^{2n}  ~~  (x^n)^2  ;;  -\frac{1}{2}x  ~~  -\frac{x}{2}  ;;  0  ~~  -0  ;;  1.50  ~~  \$1.50
3 \text{ hours } 30 \text{ minutes}  ~~  3 \text{ hours } 30 \text{ minutes}  ;;  2:00  ~~  2:00  ;;  10^{10}  ~~  10000000000
1 \frac{1}{2}  ~~  1.5  ;;  -1 \frac{1}{2}  ~~  -1.5  ;;  3.5 = \frac{7}{2}  ~~  \frac72  ;;  \frac{7}{2} = 3.5  ~~  \frac72
x = \frac{7}{2} = 3.5  ~~  \frac72  ;;  \frac{22}{7} \approx 3.14  ~~  \frac{22}{7}  ;;  x \approx 3.14  ~~  3.14  ;;  \approx 3.14  ~~  3.14
a=1, b=2  ~~  a=1,b=2  ;;  b=2,a=1  ~~  a=1,b=2  ;;  (a,b)=(1,2)  ~~  (a,b)=(1,2)  ;;  (1,2)  ~~  (a,b)=(1,2)  ;;  \{(1,2)\}  ~~  (1,2)
[0, \infty)  ~~  x \geq 0  ;;  \emptyset  ~~  \{\}  ;;  \text{None}  ~~  \text{none}  ;;  5\%  ~~  0.05  ;;  5  ~~  5\text{ cm}
5\ \text{cm}  ~~  5\text{ cm}  ;;  5\text{cm}  ~~  5\text{ centimeters}  ;;  5 \operatorname{cm}  ~~  5\text{ cm}  ;;  5 {\rm cm}  ~~  5\text{ cm}
25\pi\text{ square inches}  ~~  25\pi  ;;  10\,\mathrm{m/s}  ~~  10  ;;  9.8\ \mathrm{m/s^2}  ~~  9.8  ;;  9.8\,\mathrm{m}\,\mathrm{s}^{-2}  ~~  9.8
3.0\times10^{8}\ \mathrm{m\,s^{-1}}  ~~  3e8  ;;  3\times 10^8 \text{ m/s}  ~~  3.0e8  ;;  42^{\circ}  ~~  42 \text{ degrees}
2\text{ and }3  ~~  2,3  ;;  \frac{3}{4}\text{ of the cake}  ~~  \frac34  ;;  **42**  ~~  42  ;;  42!  ~~  42!  ;;  `42`  ~~  42  ;;  42\\  ~~  42
42\quad  ~~  42  ;;  \;42\;  ~~  42  ;;  42 \square  ~~  42  ;;  \displaystyle\frac{1}{2}  ~~  \frac12  ;;  \bf{42}  ~~  42  ;;  \Large 42  ~~  42
\color{red}{42}  ~~  42  ;;  \underline{42}  ~~  42  ;;  {\large 42}  ~~  42  ;;  1,2,3,\ldots  ~~  1,2,3,\ldots
"""

# ... and these are wrong.
WRONG = r"""
43  ~~  42  ;;  -42  ~~  42  ;;  42 \text{ (or maybe 41)}  ~~  42  ;;  42 or 41  ~~  42  ;;  42, 41  ~~  42  ;;  \text{maybe } 42  ~~  42
\text{not } 42  ~~  42  ;;  41=42  ~~  42  ;;  42=41  ~~  42  ;;  41=42  ~~  41  ;;  \{2,4\}  ~~  (2,4)  ;;  (2,4)  ~~  \{2,4\}  ;;  (4,2)  ~~  (2,4)
[2,4]  ~~  (2,4)  ;;  [2,4)  ~~  (2,4]  ;;  3:30 \text{ AM}  ~~  3:30 \text{ PM}  ;;  3:31  ~~  3:30  ;;  \frac{1}{2^{99}}  ~~  \frac{1}{2^{98}}
1/2^{99}  ~~  1/2^{98}  ;;  52_{10}  ~~  52_8  ;;  25_8  ~~  52_8  ;;  0.62  ~~  62.5\%  ;;  625\%  ~~  62.5\%  ;;  0.35\%  ~~  0.35
0.35\%  ~~  35\%  ;;  3500\%  ~~  35\%  ;;  4.5 \times 10^{32}  ~~  4.5e33  ;;  4.6e33  ~~  4.5e33  ;;  4.5e+32  ~~  4.5e33  ;;  0.333  ~~  \frac13
0.33333333  ~~  \frac13  ;;  3.14  ~~  \pi  ;;  3.14159265358979  ~~  \pi  ;;  \frac{22}{7}  ~~  \pi  ;;  6.708203932499369  ~~  3\sqrt5
x=5  ~~  x=6  ;;  y=5  ~~  x=5  ;;  x < 2  ~~  x > 2  ;;  x \ge 2  ~~  x > 2  ;;  (2,\infty]  ~~  [2,\infty)  ;;  \text{No}  ~~  \text{Yes}
Yes  ~~  No  ;;  \text{yes or no}  ~~  yes  ;;  \text{odd}  ~~  \text{even}  ;;  \text{west}  ~~  \text{east}  ;;  A  ~~  B  ;;  (A)  ~~  \text{(B)}
\text{A or B}  ~~  B  ;;  A, B  ~~  B  ;;  (B) or (C)  ~~  B  ;;  \text{(B) or (C)}  ~~  (B)  ;;  48 \text{ mph}  ~~  48 \text{ km/h}
15 \text{ cm}  ~~  15 \text{ m}  ;;  15 \text{ cm}  ~~  15 \text{ cm}^2  ;;  5.4 \text{ dollars}  ~~  5.4 \text{ cents}  ;;  \frac{\pi}{2}  ~~  90
90  ~~  \frac{\pi}{2}  ;;  \begin{pmatrix} 1 & 2 \end{pmatrix}  ~~  \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \\ 0 \end{pmatrix}  ~~  \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix} 2 \\ 1 \end{pmatrix}  ~~  \begin{pmatrix} 1 \\ 2 \end{pmatrix}  ;;  y = 2x - 3  ~~  y = 2x+3  ;;  y = 2x+3 = 5  ~~  y=2x+3
2x+3=0  ~~  y=2x+3  ;;  0=0  ~~  y=2x+3  ;;  x=x  ~~  y = 2x+3  ;;  5  ~~  x^2+y^2=5  ;;  x^2+y^2=25  ~~  x^2+y^2=5  ;;  2,2,3  ~~  2,3
3  ~~  3,5  ;;  3,5,7  ~~  3,5  ;;  3,5,5  ~~  3,5  ;;  1+\sqrt{19}  ~~  1 \pm \sqrt{19}  ;;  1 \pm \sqrt{17}  ~~  1 \pm \sqrt{19}
2 \pm \sqrt{19}  ~~  1 \pm \sqrt{19}  ;;  123456789012345678901234567891  ~~  123456789012345678901234567890  ;;  1234567  ~~  1234576
1,234  ~~  1,243  ;;  1234  ~~  12.34  ;;  2^{100}  ~~  2^{100}+1  ;;  2x  ~~  x^2  ;;  2k+1  ~~  2k  ;;  -13x-3  ~~  -13x+3  ;;  \sin x  ~~  \cos x
\tan x  ~~  \cot x  ;;  e^{2x}  ~~  e^{x^2}  ;;  \log_2 9  ~~  3  ;;  1-i  ~~  1+i  ;;  \sqrt{-4}  ~~  -2i  ;;  3i  ~~  3  ;;  \sqrt{2}  ~~  2
\frac{35}{22}  ~~  \frac{22}{35}  ;;  2\frac{1}{4}  ~~  \frac{1}{2}  ;;  \text{Tuesday or Thursday}  ~~  Tuesday  ;;  \text{not Tuesday}  ~~  Tuesday
\text{Tuesday, Thursday}  ~~  Tuesday  ;;  x  ~~  y  ;;  \text{x}  ~~  \text{y}  ;;  \emptyset  ~~  0  ;;  0  ~~  \emptyset  ;;  \{0\}  ~~  \emptyset
(-\infty,\infty)  ~~  (-\infty,-3)\cup(-3,\infty)  ;;  (-\infty, 2) \cup [3, \infty)  ~~  (-\infty, 2) \cup (3, \infty)
(-\infty,3]  ~~  (-\infty,3)  ;;  \mathbb{R}  ~~  (0,\infty)  ;;  \infty  ~~  -\infty  ;;  [1, 3]  ~~  [1, 2]  ;;  (8,-1)  ~~  (8,-1,5)
2:3  ~~  3:2  ;;  1:10  ~~  3:30  ;;  20000/\pi^2  ~~  \frac{20000}{\pi}  ;;  10^{-300}  ~~  0  ;;  \frac{1}{2^{999}}  ~~  0  ;;  0.0000000001  ~~  0
0.0000001  ~~  0.0000002  ;;  \text{forty-two}  ~~  42  ;;  x+41=42  ~~  42  ;;  42x  ~~  42  ;;  42+0x  ~~  43  ;;  \text{41} 42  ~~  42
42 42  ~~  42  ;;  4 2  ~~  42  ;;  \frac{42}{1}, 41  ~~  42  ;;  \text{I think } 41  ~~  42  ;;  42 \text{ is not the answer}  ~~  42
\text{None}  ~~  42  ;;  ?  ~~  42  ;;  \ldots  ~~  42  ;;  \text{}  ~~  42  ;;  \sum_{k=1}^{42} 1  ~~  42  ;;  \int_0^{42} 1 dx  ~~  42
\lim_{x\to 42} x  ~~  42  ;;  \max(41,42)  ~~  42  ;;  42 \neq 41  ~~  42  ;;  42 > 41  ~~  42  ;;  x > 41  ~~  42  ;;  42 \cdot 10^0 + 1  ~~  42
((((42!)!)!)!)  ~~  42  ;;  9^{9^{9^{9}}}  ~~  42  ;;  x=41, x=42  ~~  42  ;;  x=42, y=41  ~~  42  ;;  (42, 41)  ~~  42  ;;  [42, 41]  ~~  42
\{42, 41\}  ~~  42  ;;  42 \pm 1  ~~  42  ;;  42 \pm 0  ~~  43  ;;  \pm 42  ~~  42  ;;  42_{10}  ~~  42_5  ;;  f(x) = x^2+2  ~~  f(x) = x^2+1
g(x) = x^2+1  ~~  f(x) = x^2+1  ;;  0.62  ~~  \frac58  ;;  -0.625  ~~  \frac58  ;;  \frac{58}{100}  ~~  \frac58  ;;  2\frac{1}{4}  ~~  \frac{2}{4}
\frac{22}{35}\%  ~~  \frac{22}{35}  ;;  -35\%  ~~  35\%  ;;  72^\circ  ~~  27  ;;  1,234,568  ~~  1,234,567  ;;  12,345,67  ~~  1234567
1.234.567  ~~  1234567  ;;  -4, -9  ~~  -4,9  ;;  (-4, 9)  ~~  -4,9  ;;  -4 < x < 9  ~~  -4,9  ;;  [-4, 9]  ~~  -4,9  ;;  9  ~~  -4,9
8,-1,5  ~~  (8,5,-1)  ;;  (8,-1,5,0)  ~~  (8,-1,5)  ;;  \{8,-1,5\}  ~~  (8,-1,5)  ;;  (-6,\frac13)  ~~  [-6,\frac13)
(-6,\frac13]  ~~  [-6,\frac13)  ;;  (-\infty,-3] \cup (-3,\infty)  ~~  (-\infty,-3) \cup (-3, \infty)
(-\infty,3) \cup (3,\infty)  ~~  (-\infty,-3) \cup (-3, \infty)  ;;  (-\infty,-3)  ~~  (-\infty,-3) \cup (-3, \infty)  ;;  9\pi + 4  ~~  9\pi-4
9 - 4\pi  ~~  9\pi-4  ;;  5  ~~  9\pi-4  ;;  -7+3i  ~~  7+3i  ;;  3+7i  ~~  7+3i  ;;  \sqrt{58}  ~~  7+3i  ;;  (x+4)(x-1)  ~~  x^2-3x-4
x^2-3x  ~~  x^2-3x-4  ;;  y^2-3y-4  ~~  x^2-3x-4  ;;  -x^2+3x+4  ~~  x^2-3x-4
\begin{pmatrix} 2 & 7 & 1 & 8 \end{pmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}
\begin{vmatrix} 2 & 7 \\ 1 & 8 \end{vmatrix}  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}
9  ~~  \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix}  ;;  x=-4y+7  ~~  y=-4x+7  ;;  y=-4x  ~~  y=-4x+7  ;;  y < -4x+7  ~~  y=-4x+7
y \neq -4x+7  ~~  y=-4x+7  ;;  6.02 \times 10^{-23}  ~~  6.02e23  ;;  6.022 \times 10^{23}  ~~  6.02e23  ;;  6.02  ~~  6.02e23  ;;  1203  ~~  1203_4
99  ~~  1203_4  ;;  3021_4  ~~  1203_4  ;;  \text{Evelyn and Carla}  ~~  \text{Evelyn}  ;;  \text{Carla}  ~~  \text{Evelyn}
\text{Evelyn, Carla}  ~~  \text{Evelyn}  ;;  \text{not Evelyn}  ~~  \text{Evelyn}  ;;  \text{parabola}  ~~  \text{ellipse}
\text{(B), (C)}  ~~  \text{(B)}  ;;  \text{(B) and (C)}  ~~  \text{(B)}  ;;  A B C D E  ~~  B  ;;  ABCDE  ~~  B  ;;  \text{Any of A, B, C}  ~~  B
\text{B?}  ~~  C  ;;  2^{98}  ~~  2^{99}  ;;  \frac{1}{3^{50}}  ~~  \frac{1}{3^{51}}  ;;  1.0000001  ~~  1  ;;  0.99999999999  ~~  1
10^{23}  ~~  10^{24}  ;;  \sin\frac{\pi}{3}  ~~  \frac12  ;;  x+1  ~~  x-1  ;;  \log_2 3  ~~  \log_3 2  ;;  e^{x}  ~~  e^{-x}
5 \text{ kg}  ~~  5 \text{ g}  ;;  5 \text{ feet}  ~~  5 \text{ meters}  ;;  30 \text{ not } 31  ~~  30  ;;  30?  ~~  31
30 \text{ if } x>0  ~~  30  ;;  30/31  ~~  30  ;;  30;31  ~~  30  ;;  30 31  ~~  30  ;;  \{30,31\}  ~~  30  ;;  30 \vee 31  ~~  30
30 \lor 31  ~~  30  ;;  30 \leq x \leq 31  ~~  30  ;;  30..31  ~~  30  ;;  30-31  ~~  30  ;;  30\to31  ~~  30  ;;  30 \text{ to } 31  ~~  30
\text{either 30 or 31}  ~~  30  ;;  \text{30 or 31}  ~~  30  ;;  \text{30, 31}  ~~  30  ;;  \text{30 (31)}  ~~  30  ;;  30 (31)  ~~  30
30 [31]  ~~  30  ;;  31, \text{ no, } 30  ~~  30  ;;  x  ~~  30  ;;  n  ~~  30  ;;  \text{answer}  ~~  30  ;;  ans  ~~  30  ;;  30x  ~~  30
30\cdot a  ~~  30  ;;  a=30,b=31  ~~  30  ;;  \text{gold}  ~~  30  ;;  \infty  ~~  30  ;;  nan  ~~  30  ;;  None  ~~  30  ;;  True  ~~  30
30=30=31  ~~  30  ;;  31=30  ~~  30  ;;  1=1  ~~  30  ;;  x=x  ~~  30  ;;  30=x=31  ~~  30
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(side.strip() for side in pair.split("  ~~  ")) for line in table.strip().splitlines() for pair in line.split("  ;;  ")]


@pytest.mark.parametrize("answer, gold", pairs(RIGHT))
def test_right(answer, gold):
    assert grade(boxed(answer), gold) == 1.0


@pytest.mark.parametrize("answer, gold", pairs(WRONG))
def test_wrong(answer, gold):
    assert grade(boxed(answer), gold) == 0.0


@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{42}.", "42"), (r"\boxed {42}", "42"), (r"\boxed{18}, no: \boxed{-18}", "-18"), (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> it is 2", None), (r"</think>\boxed{1}</think>\boxed{2}<think>\boxed{3}", "3"),
    (r"\boxed{41} and then \boxed{4", "41"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\boxed{5}}", "{5}"), (r"\boxed{x = \boxed{5}}", "x = {5}"), (r"\boxed{3} } }", "3"), (r"{ { \boxed{3}", "3"), (r"\boxed{}", ""),
    ("the answer is 42", None), (r"\boxed 5", None), (r"\fbox{5}", None), (r"\boxed{42} final answer is 41", "42"), ("", None),
    (r"\boxed{7}" + "x" * 30_000, None),
])
def test_extract(response, expected):
    assert extract_answer(response) == expected


def test_extraction_is_linear():
    start = time.monotonic()
    for text in ("\\boxed{" * 200_000, "\\boxed{1}" * 100_000, "{" * 1_000_000, "\\boxed" + " " * 1_000_000, "</think>" * 100_000):
        extract_answer(text)
    assert time.monotonic() - start < 2


def test_public_sample():
    misses = [row for row in shared("grader_sample.jsonl") if bool(grade(row["response"], row["gold"])) != row["expected"]]
    assert not misses


@pytest.mark.parametrize("name", ["math500", "amc23", "aime24"])
def test_benchmark_golds(name):
    golds = [row["answer"] for row in shared(f"data/{name}.jsonl")]
    assert [g for g in golds if not gold_is_gradable(g)] == []
    assert [g for g in golds if not grade(f"Therefore the answer is ${boxed(g)}$.", g)] == []
    other = [(a, g) for a, g in zip(golds, golds[1:]) if len({module._normalise(x).removeprefix("x=") for x in (a, g)}) == 2]
    assert [(a, g) for a, g in other if grade(boxed(a), g)] == []


GOLDS = ["30", r"\frac{1}{2}", "x^2+1", r"(2,\infty)", r"\text{Tuesday}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "1,2", "y=2x+3", r"\lfloor x \rfloor"]
HOSTILE = {
    "tower": "9^{9^{9^{9}}}", "python tower": "9**9**9**9", "factorials": "((((90!)!)!)!)", "big factorial": "100000000!", "bang": "3" + "!" * 300,
    "parentheses": "(" * 200 + "30" + ")" * 201, "nested 200": "(" * 200 + "3+4" + ")" * 200, "sqrts": r"\sqrt{" * 150 + "2" + "}" * 150,
    "bare sqrts": r"\sqrt" * 190 + "2", "fracs": r"\frac{1}{1+" * 100 + "1" + "}" * 100, "digits": "9" * 900, "million digits": "9" * 1_000_000,
    "megabyte": "x+" * 500_000, "nul": "30\0", "bidi": "\u202e03", "zero width": "3\u200b0", "import": "__import__('os').system('touch MARKER')",
    "eval": "eval(\"open('MARKER','w')\")", "lambda": "(lambda: open('MARKER','w'))()", "text eval": r"\text{__import__('os').system('touch MARKER')}",
    "write18": r"\immediate\write18{touch MARKER}", "sum": r"\sum_{k=1}^{10^9} k", "product": r"\prod_{k=1}^{1000000000} k", "integral": r"\int_0^1 x^{x^x} dx",
    "limit": r"\lim_{n\to\infty} (1+1/n)^n", "inconsistent": "29=30", "chain": "=".join("30" for _ in range(300)) + "=31", "many": ",".join(map(str, range(200))),
    "hedge": r"30 \text{ or } 31", "hedged": r"30 \text{ (or maybe 31)}", "minus signs": "x^" + "-" * 900 + "1", "commas": "," * 900, "units": "1" + r"\%" * 400,
    "floor tower": r"\lfloor 9^{9^{9^9}} \rfloor", "symbolic": "(a+b+c+d+f+g+h)^{999}", "trig": r"\sin(10^{1000})", "absolute": "|" * 200,
    "brackets": "[" * 400, "sets": r"\{" * 300, "plus minus": r"\pm" * 300, "equals": "=" * 900, "carets": "2^" * 400 + "2", "backslashes": "\\" * 901,
    "matrix": r"\begin{pmatrix}" * 40, "e": "1e999999999", "e2": "1e-9999", "root": r"\sqrt[10^{400}]{2}", "frac": r"\frac" * 200, "log": r"\log_0 0",
    "unicode": "𝟛𝟘", "surrogate": "\ud800", "percent": "%" * 500, "dollar": "$" * 500, "subscript": "1_" * 300 + "2", "unions": r"(1,2)\cup" * 100 + "(3,4)",
    "inequalities": "<".join("x" * 300), "gcd": r"\gcd(9^{99999}, 3)", "binomial": r"\binom{1000000}{500000}", "determinant": r"\det(9^{9^9})",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for gold in GOLDS:
        start = time.monotonic()
        assert grade(boxed(HOSTILE[name]), gold) == 0.0
        assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("response", [None, 5, b"\\boxed{1}", ["\\boxed{1}"], {}, float("nan"), "", "\\boxed{" * 20_000, "\\boxed{1} " * 20_000 + "\\boxed{2}"])
def test_odd_responses(response):
    assert grade(response, "1") == 0.0
    assert grade(response, response) == 0.0


@pytest.mark.parametrize("gold", ["", "   ", r"\frac{1}{", "}{", "+", r"\frac", "1/0", None, 5, "9" * 5000, "$$", "=", "x=", r"\left("])
def test_unparsable_gold_never_scores(gold):
    assert not gold_is_gradable(gold)
    grader_counts()
    assert grade(boxed(str(gold)), gold) == 0.0
    assert grader_counts()["unparsable_gold"] == 1


def test_counts_are_reset_by_reading():
    grader_counts()
    for response, gold in [(boxed("1"), "1"), (boxed("2"), "1"), ("1", "1"), (boxed("1"), "")]:
        grade(response, gold)
    assert grader_counts() == {"right": 1, "wrong": 1, "no_box": 1, "timeouts": 0, "crashes": 0, "unparsable_gold": 1}
    assert sum(grader_counts().values()) == 0


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=r"\{}[]()0123456789.,+-*/^_=<>|!%$:; xyie'" + "\n", max_size=40), st.sampled_from(GOLDS))
def test_any_latex_like_text(answer, gold):
    start = time.monotonic()
    assert grade(boxed(answer), gold) in (0.0, 1.0)
    assert time.monotonic() - start < 5


# ---- the workers ----

SLOW_PATH = (boxed(r"\lfloor 7/2 \rfloor"), "3")      # only Math-Verify knows floor


def fresh():
    """Empty the cache, so that the workers are asked again."""
    module._outcome.cache_clear()


def workers() -> list:
    return module._idle


def test_batch_with_hostile_rollouts_is_fast():
    fresh()
    good = [(boxed(str(n)), str(n)) for n in range(44)] + [(boxed(f"\\lfloor {n}/2 \\rfloor"), str(n // 2)) for n in range(44)]
    bad = [(boxed(HOSTILE[name]), "30") for name in ("tower", "factorials", "nested 200", "million digits", "megabyte", "sum", "floor tower", "gcd")]
    rows = good + bad
    random.Random(0).shuffle(rows)
    start = time.monotonic()
    rewards = grade_batch([r for r, _ in rows], [g for _, g in rows])
    assert time.monotonic() - start < 10
    assert rewards == [0.0 if row in bad else 1.0 for row in rows]


def test_the_callers_alarm_is_left_alone():
    fresh()
    fired = []
    old = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGINT, signal.SIGCHLD, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        assert grade(*SLOW_PATH) == 1.0
        grade(boxed(r"\lfloor 9^{9^9} \rfloor"), r"\lfloor 9^{9^8} \rfloor")
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert handlers == {s: signal.getsignal(s) for s in handlers}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert not fired


def test_a_killed_worker_is_replaced():
    fresh()
    assert grade(*SLOW_PATH) == 1.0
    used = {workers()[-1].pid}                                                              # the slot on top is the next to serve
    for pid in used:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(alive, used)))
    fresh()
    grader_counts()
    assert grade(*SLOW_PATH) == 1.0 and grader_counts()["crashes"] == 0             # killed while idle: nothing is lost
    assert not used & {worker.pid for worker in workers()}


def test_a_stuck_worker_is_killed_in_time(monkeypatch):
    fresh()
    grade(*SLOW_PATH)
    monkeypatch.setattr(module, "_worth_asking", lambda a, g: True)
    grader_counts()
    start = time.monotonic()
    assert grade(boxed(r"\gcd(3, 9^{99999999}) + \lfloor 2 \rfloor"), "30") == 0.0
    assert time.monotonic() - start < 6
    monkeypatch.undo()
    fresh()
    assert grade(*SLOW_PATH) == 1.0


def script(tmp_path, text: str) -> Path:
    path = tmp_path / "user.py"
    path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(HERE)!r})\nimport {module.__name__} as module\n"
                    f"GOLD, ANSWER = {SLOW_PATH[1]!r}, {SLOW_PATH[0]!r}\n" + textwrap.dedent(text))
    return path


def test_a_script_without_a_main_guard(tmp_path):
    """multiprocessing's spawn would run the script again in each worker."""
    path = script(tmp_path, """
        with open("runs", "a") as f:
            f.write("x")
        print(module.grade(ANSWER, GOLD), *[w.pid for w in module._idle], flush=True)
    """)
    out = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    reward, *pids = out.stdout.split()
    assert reward == "1.0" and pids and out.stderr == ""
    assert (tmp_path / "runs").read_text() == "x"
    assert wait_until(lambda: not any(alive(int(pid)) for pid in pids), 3)      # no child is left after the parent's exit


def test_no_orphans_after_sigkill(tmp_path):
    path = script(tmp_path, """
        assert module.grade(ANSWER, GOLD) == 1.0
        print(*[w.pid for w in module._idle], flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, path], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(map(alive, pids))
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(alive, pids)), 3)


def test_a_forked_child_grades_with_workers_of_its_own(tmp_path):
    path = script(tmp_path, """
        assert module.grade(ANSWER, GOLD) == 1.0
        mine = {w.pid for w in module._idle}
        pid = os.fork()
        module._outcome.cache_clear()
        ok = module.grade(ANSWER, GOLD) == 1.0
        if pid == 0:
            ok = ok and not mine & {w.pid for w in module._idle}
            os._exit(0 if ok else 1)
        print(ok and os.waitpid(pid, 0)[1] == 0 and mine == {w.pid for w in module._idle}, flush=True)
    """)
    out = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert out.stdout.split() == ["True"], out.stderr


def test_any_thread_may_grade():
    """SIGALRM-based time-outs raise off the main thread; ours are in the workers' main threads."""
    fresh()
    rows = [(boxed(f"\\lfloor {n}/3 \\rfloor"), str(n // 3 + n % 2)) for n in range(12)]
    rewards = [None] * 12
    threads = [threading.Thread(target=lambda i=i: rewards.__setitem__(i, grade(*rows[i]))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [float(n % 2 == 0) for n in range(12)]


def test_a_worker_killed_at_work_costs_one_verdict_and_is_replaced(monkeypatch):
    fresh()
    assert grade(*SLOW_PATH) == 1.0
    monkeypatch.setattr(module, "_worth_asking", lambda a, g: True)
    victim = workers()[-1]
    threading.Timer(0.5, victim.kill).start()
    grader_counts()
    assert grade(boxed(r"\gcd(3, 9^{99999999}) + \lfloor 4 \rfloor"), "30") == 0.0
    assert grader_counts()["crashes"] == 1 and victim.wait() is not None
    monkeypatch.undo()
    fresh()
    assert grade(*SLOW_PATH) == 1.0


def test_workers_do_not_load_torch():
    fresh()
    grade(*SLOW_PATH)
    maps = Path(f"/proc/{workers()[-1].pid}/maps").read_text()
    assert "sympy" in Path(f"/proc/{workers()[-1].pid}/cmdline").read_text() and "torch" not in maps
