"""The grader: pairs made by us, the real reference answers, random answers, hostile text."""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

import data
import grader
from grader import answers_match, extract_answer, grade

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
FAULTS = DATA.parent / "faults" / "pairs.jsonl"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="the data sets are not beside the project (../shared/data)"
)

# One line a group: the answers between the bars are all equal to each other.
EQUAL = r"""
0.5 | \dfrac12 | .5 | ½
\tfrac{1}{2} | 1/2
5 | x=5 | x = 5 | 5 apples | x=2+3=5 | 2+3=5 | +5 | 5.0
120,000 | 120000
1000 | 1\,000 | 1,\!000 | 1 000
1000000 | 1 000 000 | 10^6
1,000 | 1{,}000
\frac13 | 0.\overline{3}
1/6 | 0.1\overline{6} | \frac{\frac12}{3}
\frac32 | 1\frac{1}{2}
1.5 | 1 \frac12
7/2 | 3 1/2
\frac{2\pi}{3} | 2\frac{\pi}{3}
1500 | 1.5\times10^3 | 1.5 \cdot 10^{3} | 1.5e3
1024 | 2^{10}
52_{8} | 52_8 | 52
110111_2 | 110111
\text{A5}_{11} | A5_{11}
even | \text{even} | Even
B | \text{(B)} | (B) | \text{B}
A, B | \text{A,B} | B, A
\text{4:30 p.m.} | 4:30 | 4:30 p.m. | 4:30 PM
4\!:\!51\!:\!06 \text{ p.m.} | 4:51:06
5:6 | \frac{5}{6}
480 + 480\sqrt{3}\text{ feet} | 480(1+\sqrt{3})
18 | 18 dollars | \$18 | \$18. | \$18.00 | $18
\$18.90 | 18.90
2-\sqrt{3} | \tan 15^\circ
7 | 7. | 007 | 7\text{ hours}.
(1, 2) | (1,2) | (x,y)=(1,2)
[1, 2) | [1,2) | \left[1,2\right)
(0.5,2) | \left( \frac12, 2 \right)
(-\infty,+\infty) | (-\infty,\infty)
(3,\infty) | x>3 | 3<x
[-1,4) | -1 \le x < 4 | x \in [-1,4) | 4 > x \ge -1
2,1 | 1,2 | x=1, 2 | x=1 \text{ or } x=2 | \{1,2\} | \{2,1\} | 1 \text{ and } 2
1, 2 | x=1 or 2
12,13 | 12\text{ and }13
-30, -12 | -12 \text{ or } -30
3+2\sqrt2, 3-2\sqrt2 | 3 \pm 2\sqrt{2}
3,-3 | \pm 3
70,110 | 70, 110 | 110, 70 | 70110
98,634 | 98634
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | \langle 1,2\rangle
(1,2) | \mathbf{v} = \begin{pmatrix}1\\[6pt]2\end{pmatrix} | [\begin{matrix}1\\2\end{matrix}]
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1 & 2\\3&4\end{bmatrix}
\begin{pmatrix}5&6\\7&8\end{pmatrix} | \left(\begin{array}{cc}5&6\\7&8\end{array}\right)
\begin{pmatrix}1/2\\-1/3\end{pmatrix} | \begin{pmatrix}0.5\\-\frac{1}{3}\end{pmatrix}
\begin{pmatrix} 1/\sqrt{2} \\ 0\end{pmatrix} | \begin{pmatrix} \sqrt{2}/2 \\ 0\end{pmatrix}
\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix} | \begin{pmatrix}1&-1\\1&1\end{pmatrix}
2x - y + 2z - 18 = 0 | 2x-y+2z-18=0 | -2x+y-2z+18=0 | 2x - y + 2z = 18
AB = 9, CD = 4 | AB=9, CD=4
\$\dfrac23 \approx \$0.67 | \frac{2}{3}
\approx 8.24 \text{ mph} | 8.24
\frac23 | \frac{2}{3} \approx 0.67
(x+1)^2 | x^2+2x+1
(x-1)(x+1) | x^2 - 1 | (x+1)(x-1)
\frac{\sqrt{24}}{3} | \frac{2\sqrt{6}}{3}
\frac{\sqrt2}{2} | \frac{1}{\sqrt{2}} | sqrt(2)/2
2\sqrt2 | \sqrt{8}
2 | \sqrt{4} | \sqrt[3]{8} | 8^{1/3} | \log 100
-2i+3 | 3-2i
\frac{7-12i}{28} | \frac{1}{4} - \frac{3}{7} i
\sqrt{2}i | i\sqrt{2}
\ln(2) | \ln 2
\ln 8 | 3\ln 2
1 | \sin^2 x + \cos^2 x
2\sin x\cos x | \sin 2x
\frac{-1}{2} | -\frac{1}{2}
-3 | −3
f(2) < f(1) < f(4) | f(2)<f(1)<f(4)
x^10 | x^{10}
\frac{x^2-4}{4} | \frac{x^2}{4}-1
32R^2-3a^2-3b^2-3c^2 | 32R^2 - 3(a^2 + b^2 + c^2)
4 | \text{four} | 2+2
infinity | \infty
\emptyset | \emptyset.
5040 | 7!
10 | \binom{5}{2}
0.0 | 0 | -0
\frac{270}{7} | \frac{270}7
\frac{270}7\text{ degrees} | \frac{270}{7}
\frac{3}{4} | \frac34
10\sqrt3 | 10\sqrt{3}\text{ cm}^2
1 + i, 1 - i | 1-i,1+i
(3,4),(1,2) | (1,2),(3,4)
(2,15),(-4,27) | (-4, 27);(2, 15)
\frac{12}{5,\!525} | \frac{12}{5525}
0.001 | 1e-3
\frac13,\frac12 | \frac{1}{2}, \frac{1}{3}
-ab-ac-bc | -(ab+ac+bc)
\frac{1}{3} | 33\frac13\%
66 \frac{2}{3}\% | 66\frac{2}{3}
3^x - 2^x | 3^{x}-2^x
\frac{\sqrt7}{4} | \frac{\sqrt{7}}{4}
6+x | x+6
\frac{\cos x}{\sin x} | \cot x
\frac{1}{\cos^2 x} | \sec^2 x
\left[\frac{29}{5},6\right) | [5.8,6)
1,2,3 | \left\{1,2,3\right\}
k = 1 | k=1
15 | 15 minutes | 15\text{ cm}^2
20 dollars | \$20
\frac{a}{b} | a/b
\frac{x}{2} | 1/2x
\sqrt[7]{12} | 12^{1/7}
\frac18 | 2^{-3}
1/8 | (1/2)^3
\frac{9\pi}{4}, \frac{\pi}{4} | \frac{\pi}{4}, \frac{9 \pi}{4}
64\pi | 64 \pi | 64 pi
2\sqrt{3} | 2*sqrt(3)
\sqrt{5} | √5
2\pi | 2π
x^2+1 | x²+1
30000 | 3×10^4
2(2+\sqrt2) | 4 + 2\sqrt2
\frac{-x+4}{5} | \frac{4-x}{5}
i\sqrt3 | \sqrt{3}i
E, H | \text{H, E}
0.005 | 5\times 10^{-3}
50 | 50\%
0.5 | 50\%
\frac12 | 50\%
3 | 300\%
0.56 = 56\% | 0.56 | 56\%
66 \frac{2}{3}\% | 66\frac23
24 | [ABC] = 24 | 24^{\text{th}} | \text{24 cups of feed} | x \equiv 24 \pmod{30}
(-\infty,5)\cup(5,\infty) | x \ne 5 | \mathbb{R}\setminus\{5\}
(-\infty,-1)\cup(-1,3)\cup(3,\infty) | \mathbb{R} \setminus \{3,-1\}
(0,9)\cup(9,36) | (0,36)\setminus\{9\}
no solution | \text{No solutions}
\text{ellipse} | an ellipse
0.01_2 | .01_2 | 0.01_{(2)} | 0.01_{\text{base }2}
\{1\pm\sqrt5,-2\} | -2,1+\sqrt5,1-\sqrt5
\{-1\} \cup \{2\} | -1,2
1+i | \sqrt2(\cos 45^\circ + i\sin 45^\circ) | \sqrt2(\cos(45^\circ)+i\sin(45^\circ))
\frac59 | {5 \over 9} | 0.\bar{5}
2:3:4 | 4:6:8
4:00 | 04:00
664_7 | 664_\text{seven}
\frac12 | \nicefrac{1}{2} | \text{one half} | \mathbf{\frac{1}{2}} | \textcolor{blue}{\frac12}
9\pi | \boldsymbol{9\pi}
-\frac{24}{7} | \tan 2\theta = -\frac{24}{7}
3\sec\frac12\theta | \frac{3}{\cos(\theta/2)}
\binom{n}{2} | \frac{n(n-1)}{2}
(n+1)! | (n+1) n!
(-\infty,-5]\cup[5,\infty) | |x| \ge 5
(-\infty,-5)\cup(5,\infty) | |x| > 5
(1,\infty) | \left]1,\infty\right[ | \{x\in\mathbb{R}: x>1\} | \text{all real numbers } x > 1
[1,2) | [1,2[
(-6,0) | the point (-6, 0)
7 | \text{There are } 7 | \text{Answer: } 7 | 7 (seven) | 7 more hours than James | 7\text{ (hours)}
3x^2+2 | 3*x**2 + 2
18\text{ cents} | 18¢
32,000,000 | 32\text{ million} | 0.032 billion
1.5\text{ million dollars} | \$1,500,000
\begin{pmatrix}1/5\\-3/5\end{pmatrix} | \frac15\begin{pmatrix}1\\-3\end{pmatrix}
\begin{pmatrix}-1&0\\0&-2\end{pmatrix} | -\begin{pmatrix}1&0\\0&2\end{pmatrix}
3:5 | 3\text{ to }5
\frac14 | ¼
10 | {}_5C_2
\frac52 | \frac52\text{ or }2.5
"""

# prediction | reference: never equal
UNEQUAL = r"""
(\frac{\pi}{3})^\circ | \frac{\pi}{3}
\infty-\infty | 0
x \ne 5 | (-\infty,5)
\mathbb{R}\setminus\{5\} | (-\infty,4)\cup(4,\infty)
\frac15\begin{pmatrix}1\\3\end{pmatrix} | \begin{pmatrix}1/5\\3\end{pmatrix}
32\text{ million} | 32
7 (eight) | 7
2:3:4 | 2:3:5
2:20 | 1:10
2:20\text{ p.m.} | 1:10\text{ p.m.}
0:0 | 2:3
4:00 | 5:00
€12.50 | \$12.50
|x| > 5 | (-\infty,-5]\cup[5,\infty)
|x-1| > 5 | (-\infty,-5)\cup(5,\infty)
n! | (n-1)!
]1,2] | [1,2]
7 \pmod{10} | 7 \pmod{12}
(C) 12 | \text{(D)}
{}_5C_2 | 10_2
-x \in [1,2] | x \in [1,2]
115,0000 | 115,000
0, 507 | 507
2500 | 25
120,006 | 120,000
0.333 | \frac13
0.33333333 | \frac13
3.14 | \pi
3 1/2 | 31/2
10^{-20} | 0
2^{2008}-2 | 2^{2008}-3
52_8 | 52_9
101_2 | 5
\text{even} | odd
B | (C)
\text{A,B} | A
4:30 a.m. | \text{4:30 p.m.}
4:31 | \text{4:30 p.m.}
6:5 | 5:6
\$5.40 | 5.4 \text{ cents}
31^\circ | 30^\circ
\cos 60 | \frac12
(2,1) | (1,2)
(1,2) | [1,2]
(-\infty, -2) \cup [2, \infty) | (-\infty, -2] \cup [2, \infty)
x \ge 3 | (3,\infty)
1 | 1,2
1,2,3 | 1,2
1,1,2 | 1,2,2
1,2 | (1,2)
3 \pm 2 \sqrt{2} | 3+2\sqrt2
\pm 3 | 3
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1 & 2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
2x - y + 2z = 17 | 2x - y + 2z - 18 = 0
y=2x+4 | y = 2x + 3
x^2+y^2=13 | 13
13 | x^2+y^2=13
(x+1)^2 | x^2+2x+2
2\sqrt{2} | 2\sqrt{3}
1.4142135 | \sqrt2
2 3 | 6
12 34 | 408
0.693147180559945 | \ln 2
3+2i | 3-2i
\frac{\pi}{4} | 45^\circ
\sin x | \cos x
-\frac{1}{2} | \frac{1}{2}
f(1)<f(2)<f(4) | f(2) < f(1) < f(4)
4t | 4
x | X
-\infty | \infty
10! | 3628801
3/4 | \frac{3}{5}
(1,2),(4,3) | (3,4),(1,2)
(100,101) | 100101
2e^3 | 2000
p-q | q-p
254 | n = 255
1-2x | 1+2x
(0,3)\cup(3,6) | (0,6)
20 cents | 20 dollars
x \le 5 | x < 5
\sqrt{x^2} | x
\frac{a}{b} | \frac{b}{a}
\alpha | \beta
1-\sqrt{5} | 1+\sqrt{5}
6.02\times10^{23} | 6.02\times10^{22}
10^{100} | 10^{101}
10^{1000}+1 | 10^{1000}
1000000007 | 1000000008
0.1 | 0.10000000001
\sqrt{2}+10^{-15} | \sqrt{2}
"""


def lines(block):
    return [[x.strip() for x in line.split(" | ")] for line in block.strip().splitlines()]


# Kinds of mistakes: the answers between the bars are all equal to the first, or all other than it.
SAME = {
    "left sides": [
        r"7 | f(4)=7 | f(-1) = 7 | g(f(2)) = 7 | f^{-1}(3) = 7 | a_{12} = 7 | S_{10}=7 | |z| = 7"
        r" | \|\mathbf{v}\| = 7 | [ABC]=7 | E[X] = 7"
        r" | \angle ABC = 7^\circ | m\angle A = 7 | \overline{PQ} = 7 | \text{Area} = 7 | 3+4 = 7",
        r"1/2 | P(A) = \frac12 | P(A \cap B)=0.5 | P(X=2) = 1/2 | \sin A = 1/2 | \cos\theta = 0.5",
        r"24 | 4! = 24 | n = 4! = 24 | 24 = n",
        r"6 | \gcd(12,18) = 6 | \det A = 6 | P(\text{red}) = 6 | \text{The area is } 6",
        r"-6 | \text{negative } 6 | \text{(D) } -6 | \textbf{(B)}\ -6",
        r"h(x) = 5x - 1 | y = 5x - 1 | 5x - 1 | h(x) = -1 + 5x",
        r"y = x/3 + 1 | x - 3y + 3 = 0 | 3y = x + 3",
        r"(3,-2) | (x,y) = (3,-2) | x=3, y=-2 | y = -2 \text{ and } x = 3 | (r,\theta) = (3,-2)",
        r"(\frac12,0,5) | (a,b,c) = (0.5,0,5) | a = 1/2, b = 0, c = 5",
    ],
    "relations": [
        r"x \ge 4 | x >= 4 | x ≥ 4 | x \geqslant 4 | 4 <= x | \{x \mid x \ge 4\} | [4,\infty)",
        r"m \ne 6 | m != 6 | m \neq 6 | m ≠ 6",
        r"-1 < t \le 5 | -1 < t <= 5 | 5 \ge t > -1 | t \in (-1,5] | (-1,5]",
        r"(-2,2) | |x| < 2 | -2<x<2",
        r"(-\infty,-2)\cup(3,\infty) | x<-2 or x>3 | x > 3 \text{ or } x < -2",
    ],
    "sets and lists": [
        r"1,3 | {1,3} | \{3, 1\} | x = 1, 3",
        r"\pm 4 | \mp 4 | -4, 4",
        r"(-\infty,\infty) | \mathbb{R} | x \in \mathbb{R} | \text{all real numbers}",
        r"\{7\}\cup(1,2) | (1,2)\cup\{7\}",
    ],
    "bases and subscripts": [
        r"347_9 | x = 347_9 | 347_{9} | 347 base 9 | 347\text{ base nine} | 347_{\text{nine}}"
        r" | (347)_9",
        r"1011_{12} | 1011_12 | 1011 \text{ (base 12)}",
        r"a_{n+1} | a_{n + 1}",
    ],
    "functions": [
        r"35 | \binom73 | \tbinom{7}{3} | {7 \choose 3}",
        r"720 | 6! | (3!)!",
        r"3 | \log_2 8 | \log_28 | \log_{10}1000 | \log_{5}{125} | \log 1000 | \ln e^3",
        r"\frac{\pi}{3} | \arccos\frac12 | \cos^{-1}\frac12 | \arctan \sqrt3",
        r"\frac{\sqrt3}{2} | \sin 60^\circ | \cos(30^{\circ}) | \sin\frac{\pi}{3}",
        r"4 | |-4| | \lfloor 4.9 \rfloor | \lceil \pi \rceil",
        r"\frac{1}{2+\sqrt3} | 2-\sqrt3",
        r"x^{5/2} | x^2\sqrt{x} | \sqrt{x^5}",
        r"-3 | \sqrt[3]{-27} | (-27)^{1/3}",
    ],
    "complex numbers": [r"3+4i | i(4-3i) | (2+i)^2", r"-3i | \frac{3}{i} | 3/i | -3i"],
    "units": [
        r"40 | 40 mph | 40\text{ mi/h} | 40\text{ miles per hour}",
        r"40 \text{ mph} | 40 miles per hour | 40 mi/hr | 40 mi/h",
        r"40 \text{ mph} | 40 \frac{\text{miles}}{\text{hour}} | 40\ \frac{\text{mi}}{\text{hr}}"
        r" | 40\text{ miles}/\text{hour} | 40 \dfrac{\mathrm{mi}}{\mathrm{h}} | 40",
        r"9.8\text{ m/s}^2 | 9.8\,\frac{\text{m}}{\text{s}^2} | 9.8",
        r"9 \text{ in} | 9 inches | 9",
        r"3\text{ seconds} | 3\text{ sec} | 3\text{ s}",
        r"8 \text{ sq. units} | 8 square units | 8\text{ units}^2 | 8\text{ cm}^2 | 8",
        r"6 | 6 red apples | 6 eggs/day | 6 apples per week | 6.00 dollars",
        r"7^\circ | 7 degrees | 7",
        r"2.5\% | 2.5 | 0.025 | 2.5 percent",
        r"0.5\% | \frac12\% | 0.005 | 0.5 percent",
    ],
    "numbers": [r"2500000 | 2.5e6 | 2.5 \times 10^6", r"3 | 2.\overline{9}", r"5:2 | 10:4 | 2.5"],
}
OTHER = {
    "percent on both sides": [r"20\% | 0.2\% | 2000\%", r"0.25 = 25\% | 0.25 = 2500\%"],
    "shares": [r"2/3 | \frac23\% | 2/3 percent", r"0.5\% | 0.5 | 50\%", r"-0.1 | -0.1\%"],
    "words that change a value": [
        f"9 | 9 {word}"
        for word in (
            "squared,cubed,factorial,trillion,halves,fifths,hundredths,minus,plus one,root,dozen"
            ",choose 2,choose two,negative,point five,or more,less than 20,doubled,repeating"
            ",hundred"
        ).split(",")
    ],
    "two units": [
        r"9\text{ cm}^2 | 9\text{ cm}^3 | 9 cubic cm | 9\text{ mm}^2 | 9 cm",
        r"9 \text{ square feet} | 9 cubic feet | 9 square inches",
        r"9\text{ mi} | 9\text{ min} | 9\text{ m}",
        r"9^\circ | \$9 | 9 radians | 9\% | 9\text{ units}",
        r"9 \text{ units} | 9 \text{ square units} | 9\text{ cm}^2 | 9 dogs",
        r"9\text{ km/h} | 9\text{ km} | 9\text{ m/s} | 9\frac{\text{mi}}{\text{h}}",
        r"9\frac{\text{m}}{\text{s}} | 9\frac{\text{m}}{\text{h}} | 9\frac{\text{s}}{\text{m}}",
    ],
    "subscripts": [r"a_{10} | a_{20} | a_1 | 10a | a_{1}0", r"3x_1 | x_{13} | x_{31}"],
    "commands are no words": [r"0 | f(\frac{x}{y}) = x - y", r"\sec x | \text{sec} x"],
    "functions": [r"0 | xf(y) - yf(x) | f(x) - g(x)", r"f(2) | 2f(1) | 2f", r"f(x)y | f(y)x"],
    "points": [r"(3,-2) | x=-2, y=3 | x=3, x=-2 | x=3, y=-2, z=0 | 3, -2 | x=3 | x=3, u=-2"],
    "left sides": [
        r"5p+q | 8 = 5p+q | 5p+q = 8",
        r"f(2)=9 | f(3)=9",
        r"9 | pq=9 | p+q=9 | 2x=9 | x^2=9 | \sqrt{x}=9 | -x=9 | f(2)+1=9 | \frac{p}{q}=9",
        r"x=4 | y=4 | 2x=8 | x^2=16 | |x|=4",
        r"\begin{pmatrix}5\\6\end{pmatrix} | B^{-1}=\begin{pmatrix}5\\6\end{pmatrix}"
        r" | 2B=\begin{pmatrix}5\\6\end{pmatrix} | -B=\begin{pmatrix}5\\6\end{pmatrix}",
        r"[1,9] | x^2\in[1,9] | 2x\in[1,9] | \sqrt{x}\in[1,9]",
        r"7 | 2+4=7 | 3! = 7 | \gcd(12,18) + 1 = 7 | 2\det A = 7 | \text{(D) 8 or } 7",
    ],
    "tiny numbers": [
        r"2^{-70} | -2^{-70} | 2^{-71} | 0 | 2^{-70}\pi | \ln 1",
        r"10^{-30} | 0 | 10^{-31}",
        r"\frac{\sqrt2}{10^{20}} | -\frac{\sqrt2}{10^{20}} | 0",
    ],
    "e": [r"8e - 1 | 0.8", r"e | 2.718281828459045 | 2.71828182845904523536028747135266"],
    "relations": [r"m \ne 6 | m = 6 | 6", r"(3,\infty) | x \ge 3 | x<3", r"x > 3 | y > 3"],
    "boxes in a box": [r"\frac{7}{2} | 6 \boxed{\frac{7}{2}} | \boxed{6} \boxed{\frac{7}{2}}"],
    "values": [r"x+1 | |x+1|", r"\log_2 8 | 2 | 8", r"i | -i", r"5 | 5 \lor 6 | 5 (6) | 5; 6"],
}


def groups(table):
    return [pytest.param(*lines(line), id=kind) for kind, block in table.items() for line in block]


@pytest.mark.parametrize("answers", [*groups(SAME), *lines(EQUAL)])
def test_equal(answers):
    for answer in answers[1:]:
        assert answers_match(answer, answers[0], "math"), (answer, answers[0])
        assert answers_match(answers[0], answer, "math"), (answers[0], answer)


@pytest.mark.parametrize("answers", groups(OTHER))
def test_kinds_of_mistakes(answers):
    for answer in answers[1:]:
        assert not answers_match(answer, answers[0], "math"), (answer, answers[0])
        assert not answers_match(answers[0], answer, "math"), (answers[0], answer)


@pytest.mark.parametrize("pred, gold", lines(UNEQUAL))
def test_unequal(pred, gold):
    assert not answers_match(pred, gold, "math") and not answers_match(gold, pred, "math")


def test_quarters_are_coins_in_a_reference_and_fourths_in_an_answer():
    for pred, gold in [("12", "12 quarters"), ("12 quarters", r"12\text{ quarters}")]:
        assert answers_match(pred, gold, "math")
    assert answers_match(r"3\text{ quarters}", "0.75", "math")
    for pred in ("3 quarters", r"3\text{ quarter cups}", "3 quarters full", "3 cubic quarters"):
        assert not answers_match(pred, "3", "math")


def test_bars_and_none():
    assert answers_match("|x|", "|x|", "math") and not answers_match("|x|", "x", "math")
    assert not answers_match(None, "5", "math") and not answers_match("", "", "math")


EXTRACT = [
    ("math", r"we get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    ("math", r"$\boxed{1}$, no: $\fbox{2}$", "2"),
    ("math", r"first \boxed{3} and after a long way of thinking about it once more \boxed{4}", "4"),
    ("math", r"\boxed{7} and then \boxed{\frac{1", "7"),
    ("math", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("math", r"\boxed{\boxed{5}}", r"\boxed{5}"),
    ("math", r"\boxed{1}, \boxed{2}\text{ or }\boxed{3}", "1, 2, 3"),
    ("math", r"The answer is $\boxed{1}$ or $\boxed{2}$. #### 2", "1, 2"),
    *[
        ("math", x, None)
        for x in (r"is -\boxed{5}", r"$-\boxed{5}$", r"\boxed{7}^2", r"$\sqrt{\boxed{10}}$")
    ],
    *[("math", x, None) for x in (r"$\frac{1}{\boxed{2}}$", r"$\boxed{2}+\boxed{3}$")],
    *[("math", x, None) for x in (r"It is not $\boxed{4}$.", r"$t$ can't be $\boxed{17}$.")],
    *[("math", x, "110") for x in (r"an angle of $\boxed{110}^\circ$", r"it is --\boxed{110}")],
    ("math", "The answer is 60.</s>", "60"),
    ("math", "So the answer is 35!", "35"),
    ("gsm8k", "#### <<5*7=35>>35", "35"),
    ("arc", "The answer is ( C ).", "C"),
    ("math", r"$x=\boxed{1}$ and $x=\boxed{2}$.", "1, 2"),
    ("math", r"\[\boxed{1}, \quad \boxed{2},\text{ and }\boxed{3}.\]", "1, 2, 3"),
    ("math", r"\boxed{1}, \boxed{1}", "1"),
    ("math", r"\boxed{1} and so on to \boxed{2}", "2"),
    ("math", r"\boxed{1} \boxed{2}", "2"),
    ("math", r"\boxed{9} or \boxed{8}. We find \boxed{1} and \boxed{2}", "1, 2"),
    ("math", r"\boxed{\boxed{5}, \boxed{6}}", r"\boxed{5}, \boxed{6}"),
    ("math", r"\boxed 3, \boxed{4}", "3, 4"),
    ("math", r"The answer is 5: \boxed{}", None),
    ("math", r"\boxed{5}. Check: yes, \boxed{5}", "5"),
    ("math", r"so it is $\boxed 9$.", "9"),
    ("math", "Final Answer: The final answer is $x^2$. I hope it is correct.", "$x^2$"),
    ("math", "The answer is 4:30 p.m. on Sunday.", "4:30 p.m. on Sunday"),
    ("math", "The answer is 5, not 6.", "5"),
    ("math", "<think>2?</think><answer> 2.5 </answer>", "2.5"),
    ("math", "The answer is 2.5. Then", "2.5"),
    ("math", "**Answer:** 12", "12"),
    ("math", "The answer is:\n\n12", "12"),
    ("math", "The answer is #### 3\nThe answer is 4", "3"),
    ("math", "so we find 42.", None),
    ("math", r"\boxed{", None),
    ("math", "", None),
    ("gsm8k", "3 * 4 = <<3*4=12>>12\n#### 12", "12"),
    ("gsm8k", "#### 1\n#### 2", "2"),
    ("gsm8k", "There are 12 of them.", None),
    ("stories", "Cid = Ida * 6 = 5 * 6 = 0 ; # 5", "5"),
    ("stories", "# 5 # 6", "6"),
    ("stories", "# -5\n", "-5"),
    ("stories", "# 5 6", None),
    ("stories", "# 5.", None),
    ("stories", "5", None),
    ("stories", "#", None),
    ("stories", "# ٥", None),
    ("code", "print(1)", "print(1)"),
    ("code", "", None),
    ("arc", "B", "B"),
    ("arc", "(B)", "B"),
    ("arc", "B.", "B"),
    ("arc", "B) dry palms", "B"),
    ("arc", "3", "3"),
    ("arc", "Because it rubs.\nThe answer is (C).", "C"),
    ("arc", "The correct answer is: D. Rain", "D"),
    ("arc", "**Answer: option A**", "A"),
    ("arc", r"$\boxed{\text{(B)}}$", "B"),
    ("arc", r"\boxed{b}", "B"),
    ("arc", "#### E", "E"),
    ("arc", "The correct option is B.", "B"),
    ("arc", "The best choice is (d).", "D"),
    ("arc", "Choice D is correct.", "D"),
    ("arc", "Ans: C", "C"),
    ("arc", "B\n\nExplanation: A magnet attracts iron.", "B"),
    ("arc", "B\n\nNo, (C) is right.", None),
    ("arc", "(d) evaporation", "D"),
    ("arc", "(d) heat, (A) light", None),
    ("arc", 'The answer is "B".', "B"),
    ("arc", "The answer is [B]", "B"),
    ("arc", "The answer is letter D", "D"),
    ("arc", "The answer is A: a dog", "A"),
    ("arc", "The answer is B a dog", "B"),
    ("arc", "The answer is A.", "A"),
    ("arc", "The answer is 4.", "4"),
    ("arc", "B. A dog and a cat", "B"),
    ("arc", "B. Either a dog or a cat", "B"),
    ("arc", "The answer is (B) and not (A).", "B"),
    ("arc", "The answer is B, not A", "B"),
    ("arc", "The answer is A dog", None),
    ("arc", "The answer is 3 meters", None),
    ("arc", "The answer is 3.5 meters", None),
    ("arc", "The answer is A B", None),
    ("arc", "The answer is (A) a dog, or maybe (B)", None),
    ("arc", r"\boxed{A} or \boxed{B}", None),
    ("arc", r"\boxed{A}, \boxed{B}", None),
    ("arc", r"\boxed{AB}", None),
    ("arc", "The answer is A or B", None),
    ("arc", "The answer is (A) and (B)", None),
    ("arc", "The answer is A, B", None),
    ("arc", "The answer is not B", None),
    ("arc", "The answer is a rock", None),
    *[
        ("arc", x, "B")
        for x in ("b", "**B**", "$B$", r"\text{B}", "Option B", "(b)", "b.", "option b")
    ],
    *[("arc", x, "C") for x in ("**(C)** salt and water", "The answer is (C) rather than (B).")],
    ("arc", "The answer is (B) gravity and (C) friction.", None),
    ("arc", "The answer is (D) heat, (A) light.", None),
    ("arc", "(D) heat, (A) light", None),
    ("arc", "The answer is B) heat and C) light.", None),
    ("arc", "e.g. a rock", None),
    ("math", r"So $\boxed{9}$ (put it into \boxed{} as asked).", "9"),
    ("math", r"I write \boxed{ } at the end. \boxed{9}", "9"),
    ("arc", "Dry palms", None),
    ("arc", "", None),
]


@pytest.mark.parametrize("task, text, answer", EXTRACT)
def test_extract(task, text, answer):
    assert extract_answer(text, task) == answer


# whole response, reference, verdict
WHOLE = [
    ("**Final Answer**\n\\boxed{5}", "5", True),
    ("\\boxed{5\\text{ or }6}", "5", False),
    ("\\boxed{x=5\\text{ or }x=6}", "5,6", True),
    ("Answer: $\\frac{1}{2}$", "0.5", True),
    ("The final answer is: $\\boxed{12}$.", "12", True),
    ("The answer is **42**.", "42", True),
    ("The answer is 42, because it is.", "42", True),
    ("#### 42\n\nThat is all", "42", True),
    ("The answer is \\(x = 3\\).", "3", True),
    ("The answer is \\[\\frac{1}{2}\\]", "1/2", True),
    ("The final answer is $\\frac{3}{4}$. I hope it is correct.", "0.75", True),
    ("Thus the answer is $(1, 2)$.", "(1,2)", True),
    ("answer is -5", "-5", True),
    ("The answer is $1,234.50.", "1234.5", True),
    ("the answer is 12 (twelve)", "12", True),
    ("\\boxed{\\textbf{(E)}\\ 12}", "\\text{(E)}", True),
    ("The answer is\n$$\n5\n$$", "5", True),
    ("\\boxed{12.50\\text{ dollars}}", "12.5", True),
    ("\\boxed{f(x)=x^2+1}", "x^2+1", True),
    ("\\boxed{a = 3, b = 4}", "3,4", True),
    ("\\boxed{\\text{The answer is } 5}", "5", True),
    ("\\boxed{\\text{The answer is not } 5}", "5", False),
    ("\\boxed{\\approx 8.24}", "8.24", True),
    ("\\boxed{\\dfrac{7}{1}}", "7", True),
    ("\\boxed{(-\\infty,3)}", "x<3", True),
    ("\\boxed{{5}}", "5", True),
    ("\\boxed{\\{5\\}}", "5", True),
    ("\\boxed{\\left(\\frac{1}{2},\\ 3\\right)}", "(0.5,3)", True),
    ("\\boxed{-x-1}", "-(x+1)", True),
    ("\\boxed{x-1}", "1-x", False),
    ("\\boxed{\\text{monday.}}", "\\text{Monday}", True),
    ("\\boxed{5 \\mathrm{~cm}}", "5", True),
    ("\\boxed{x^2 + y^2 - 13 = 0}", "x^2+y^2=13", True),
    ("\\boxed{y = \\frac{1}{2}x+3}", "x-2y+6=0", True),
    ("\\boxed{\\text{(A), (C)}}", "A,C", True),
    ("\\boxed{0.785}", "\\frac{\\pi}{4}", False),
    ("\\boxed{5+0i}", "5", True),
    ("\\boxed{|x|\\le 3}", "[-3,3]", True),
    ("\\boxed{3\\sqrt{2}+\\sqrt{3}}", "\\sqrt3+3\\sqrt2", True),
    ("\\boxed{\\begin{bmatrix}1\\\\2\\end{bmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("\\boxed{60^{\\circ}, 120^\\circ}", "60,120", True),
    ("\\boxed{-\\frac{\\sqrt{2}}{2}-\\frac{\\sqrt{2}}{2}i}", "-\\frac{1+i}{\\sqrt2}", True),
    ("\\boxed{(1,2)\\cup(3,4)}", "(3,4)\\cup(1,2)", True),
    ("\\boxed{1.5\\text{ million}}", "1500000", True),
    ("\\boxed{\\varnothing}", "\\emptyset", True),
    ("\\boxed{5}\n\n#### 6", "5", True),
    ("\\boxed{\\log_{2}{3}}", "\\frac{\\ln 3}{\\ln 2}", True),
    ("\\boxed{\\cos^2\\theta}", "1-\\sin^2\\theta", True),
    ("\\boxed{1.5\\text{ million}}", "1.5", False),
    ("\\boxed{5\\text{ thousand}}", "5", False),
    ("\\boxed{(3,\\frac{\\pi}{2})}", "\\left(3,\\frac{\\pi}{2}\\right)", True),
    ("\\boxed{AB}", "BA", False),
    ("\\boxed{x=1,y=2}", "y=2,x=1", True),
    ("\\boxed{x=1,y=2}", "x=2,y=1", False),
    ("\\boxed{x=2,y=1}", "1,2", True),
]


@pytest.mark.parametrize("response, gold, right", WHOLE)
def test_whole_outputs(response, gold, right):
    assert grade([response], [gold], "math") == [right]


def test_tasks():
    assert grade(["x # 5", "x # 05", "x"], ["5"] * 3, "stories") == [True, False, False]
    responses = ["The answer is (B)", r"\boxed{C}", "The answer is B or C"]
    assert grade(responses, ["B"] * 3, "arc") == [True, False, False]
    responses = ["#### 18", "#### $18.00", "The answer is 18 eggs per day.", "18"]
    assert grade(responses, ["18"] * 4, "gsm8k") == [True] * 3 + [False]
    assert grade(["#### 1,800", "#### 180"], ["1800", "1,800"], "gsm8k") == [True, False]
    calculations = ["#### 5*(16-3-4)", "#### 90/2", r"#### 9 \cdot 5", "#### 5*9=45", "#### -45"]
    golds = ["45", "45", "45", "45", "-45"]
    assert grade(calculations, golds, "gsm8k") == [False, False, False, True, True]
    assert grade(["#### 2 million", "#### $2,000,000"], ["2000000"] * 2, "gsm8k") == [True, True]
    with pytest.raises(ValueError):
        grade(["5"], ["5", "6"], "math")


def test_a_new_task_reuses_a_grader(monkeypatch):
    monkeypatch.setitem(grader.GRADERS, "new", grader.GRADERS["math"])
    assert grade([r"\boxed{\frac12}"], ["0.5"], "new") == [True]


# -- real references -----------------------------------------------------------------------------


def rows(name):
    return [row for _, row in data.read_rows(str(DATA / name))]


@needs_data
def test_math500_references_equal_themselves():
    golds = [row["answer"] for row in rows("math/math500.jsonl")]
    assert sum(grade([rf"Thus $\boxed{{{gold}}}$." for gold in golds], golds, "math")) == 500
    # The same again past the first string comparison.
    assert all(answers_match(gold + r"\,.", gold, "math") for gold in golds)


@needs_data
def test_math_train_references():
    train = rows("math/train12k.jsonl.gz")
    right = grade([row["solution"] for row in train], [row["answer"] for row in train], "math")
    # Two have no answer, one box stands behind a minus. 18 times two boxes are a list.
    assert sum(right) == len(train) - 21
    golds = sorted({row["answer"] for row in train if row["answer"]})
    shuffled = random.Random(0).sample(golds, len(golds))
    equal = sum(grade([rf"\boxed{{{x}}}" for x in shuffled], golds, "math"))
    assert equal <= 8  # chance pairs such as 1/2 and 0.5


@needs_data
def test_gsm8k_references():
    answers = [row["answer"] for row in rows("gsm8k/test.jsonl")]
    golds = [answer.split("####")[1].strip() for answer in answers]
    plain = [gold.replace(",", "") for gold in golds]
    assert all(grade(answers, golds, "gsm8k"))
    assert all(grade([f"The answer is ${x}.00." for x in plain], golds, "gsm8k"))
    tenfold = grade([f"#### {x}0" for x in plain], golds, "gsm8k")
    assert sum(tenfold) == plain.count("0")
    assert not any(grade([f"#### {int(x) + 1}" for x in plain], golds, "gsm8k"))


@needs_data
def test_no_real_reference_answer_is_a_copy_of_its_question():
    for row in rows("math/train12k.jsonl.gz") + rows("math/math500.jsonl"):
        assert not grader.copies(row["answer"], row["answer"], row["problem"]), row["unique_id"]


# -- properties ----------------------------------------------------------------------------------


def number(rng):
    a, b = rng.randint(-50, 50), rng.randint(2, 30)
    forms = [f"{a}", f"{a / 8}", rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", rf"{b}\sqrt{{{abs(a)}}}"]
    return rng.choice([*forms, rf"{a}\pi", f"{a}x^{b}"])


def answer(rng):
    xs = [number(rng) for _ in range(rng.randint(2, 4))]
    forms = [xs[0], f"x={xs[0]}", f"{xs[0]}+{xs[1]}", f"[{xs[0]},{xs[1]})", ", ".join(xs)]
    forms += [rf"\{{{xs[0]},{xs[1]}\}}", f"({','.join(xs)})"]
    return rng.choice([*forms, r"\begin{pmatrix}" + r"\\".join(xs) + r"\end{pmatrix}"])


def test_reflexive_and_symmetric():
    rng = random.Random(1)
    answers = [answer(rng) for _ in range(400)]
    for x, y in zip(answers, answers[1:]):
        assert answers_match(x, rf"\left. {x}\right.", "math")
        assert answers_match(x, y, "math") == answers_match(y, x, "math")


def test_rationals_are_exact():
    rng = random.Random(2)
    for _ in range(300):
        a, b, k = rng.randint(-99, 99), rng.randint(1, 99), rng.randint(1, 9)
        assert answers_match(rf"\frac{{{a * k}}}{{{b * k}}}", f"{a}/{b}", "math")
        assert not answers_match(rf"\frac{{{a * 10**12 + 1}}}{{{b * 10**12}}}", f"{a}/{b}", "math")


def test_lists_in_any_order_tuples_not():
    rng = random.Random(3)
    for _ in range(100):
        xs = [str(x) for x in rng.sample(range(-20, 20), 4)]
        ys = rng.sample(xs, 4)
        assert answers_match(", ".join(xs), r"\{" + ",".join(ys) + r"\}", "math")
        assert answers_match(f"({','.join(xs)})", f"({','.join(ys)})", "math") == (xs == ys)


PIECES = (
    r"\frac \sqrt { } ( ) [ ] , ; = < \le \pm \cup ^ _ ! \text{ \begin{pmatrix} \end{pmatrix} \\ &"
    r" \left \right 1 2.5 .5 1,000 x \pi \sin \log \infty \overline{3} \% % $ \$ °  cm p.m. or and"
    r" # answer is \boxed{ | \in"
).split(" ")


def test_never_raises():
    rng = random.Random(4)
    for _ in range(1500):
        a, b = ("".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(2))
        for task in ("math", "gsm8k", "arc", "stories"):
            extract_answer(a, task)
            answers_match(a, b, task)
    for _ in range(500):
        ranges = [(0, 128), (0, 0x11000), (0xD800, 0xE000)]
        a = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(9))
        assert answers_match(a, a, "math") == bool(a.strip())
        extract_answer(a, "math")


# -- hostile text --------------------------------------------------------------------------------

HOSTILE = [
    "9^{9^{9^{9}}}",
    "9^9^9^9^9",
    "((9^{999})^{999})^{999}",
    "10^{10^{10}}",
    "e^{e^{e^{e^{9}}}}",
    "(10^9)!",
    "1000000000!",
    "9!!!!!!",
    r"\binom{10^9}{10^8}",
    r"\sum_{n=1}^{10^9} \frac{1}{n}",
    r"\prod_{n=1}^{10^8} n",
    r"\int_0^1 x^{x^x} dx",
    "{" * 400,
    "(" * 240 + "1" + ")" * 240,
    r"\frac{" * 80 + "1" + "}{2}" * 80,
    r"\sqrt{" * 90 + "2" + "}" * 90,
    "1" * 100_000,
    "1+" * 500_000 + "1",
    "\\boxed{" * 100_000,
    "\\boxed{1}, " * 90_000,
    "a" * 1_000_000,
    "\x00" * 50,
    "5\x00",
    "\ud800",
    "5\udfff",
    "$" * 500,
    "\\" * 500,
    "-" * 499 + "1",
    r"\sin" * 120,
    "|" * 100,
    "^" * 50,
    ",".join(["1"] * 200),
    " " * 1_000_000 + "6",
    r"|\sin(9^{9^9})|",
    r"\lfloor 9^{99999} \rfloor",
    "1e999999999",
    "0." + "0" * 400 + "1",
    r"0.\overline{" + "9" * 400 + "}",
    "(x+1)^{99999}",
    "(x+y+z)^{5000}",
    r"\lceil (x+1)^{9999} \rceil",
    "__import__('os').system('touch /tmp/owned')",
    "B or " * 200_000,
    r"\boxed 6 or " * 90_000,
    "```\n" * 100_000,
    "(A) or " * 100_000,
    "answer is " * 100_000,
    "#### " * 100_000,
    "5 " * 400,
    "a.m. " * 90,
    r"\text{" * 99,
    "1_" * 200,
    "1:" * 200,
    r"\pm1" * 100,
    r"\sin 10^{9000}+" * 28 + "1",
    "x^{999}+" * 60 + "1",
    "999!+" * 90 + "1",
    r"\log " * 100 + "2",
    "1%" * 300,
]


@pytest.mark.parametrize("i", range(len(HOSTILE)))
def test_hostile(i):
    text = HOSTILE[i]
    start = time.process_time()
    responses = [
        rf"\boxed{{{text}}}",
        r"\boxed{\frac{10}{2}}",
        text,
        "#### " + text,
        r"\boxed{5.0001}",
    ]
    for task in ("arc", "code", "gsm8k"):
        assert all(extract_answer(x, task) != "5" or "5" in text[:9] for x in responses[2:4])
    verdicts = grade(responses, ["5"] * 5, "math")
    verdicts += [answers_match(text, "7", "math"), answers_match("7", text, "math")]
    assert time.process_time() - start < 10
    assert verdicts[1] and not verdicts[4] and not any(verdicts[5:])
    assert not any(verdicts[::2]) or "5" in text[:2]


def test_import_is_light():
    code = "import sys, grader; sys.exit(any(m in sys.modules for m in ('sympy', 'torch')))"
    folder = pathlib.Path(grader.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


# question, reference, right answers that restate the question, right answers that do not
COPIES = [
    (r"Evaluate $81^{3/4}$. Is it 27?", "27", r"81^{\frac{3}{4}} | (081)^{3.0/4.}+0", "27 | 3^3"),
    ("Simplify $(5-2i)3+4i$.", "15-2i", "-(-(5-2i)3-4i) | 4i+(5-2i)3", "-2i+15 | 15-6i+4i"),
    (r"Simplify $\sqrt{180}$.", r"6\sqrt5", r"1\cdot\sqrt{180} | 180^{2/4}", r"\sqrt{36}\sqrt5"),
    ("Simplify $1-(1-(1-x))$.", "1-x", "1-(1-(1-x))", "-x+1"),
    (r"Simplify $\frac{16}{20}$.", r"\frac45", r"16/20 | \dfrac{16}{20}", "0.8 | 8/10"),
    ("Let $x=47^2+47+3$. What is $x$?", "2259", "47^2 + (47+3)", r"47\cdot48+3 | 2209+50"),
    (r"Expand $(t+4)^2 \cdot t$.", "t^3+8t^2+16t", "t(t+4)^2", "t(t^2+8t+16)"),
    (
        r"Simplify $\frac{7}{\sqrt3}$.",
        r"\frac{7\sqrt3}{3}",
        r"7/\sqrt3=7/\sqrt3",
        r"\sqrt3\cdot7/3",
    ),
    (r"What is $6\cdot7\cdot2$?", "84", "(6)(7)(2) | 6(7)2", "42(2) | 84"),
    ("What is \\[\n5+6+7?\n\\]", "18", "5+6+7 | 7+6+5", "11+7"),
    ("Simplify $6:10$.", "3:5", "6:10", "3:5"),
    (r"Find $\arcsin 1$.", r"\frac{\pi}{2}", r"(\arcsin 1) | (\arcsin(1))", r"\pi/2"),
    ("What is $2.5$ as a fraction?", r"\frac52", "", r"2.5 | 5/2 | 2\frac12"),
    ("Write $4x - 2y + 6 = 0$ as $y = mx + b$.", "y=2x+3", "4x-2y+6=0 | 6=2y-4x", "y=3+2x"),
]


@pytest.mark.parametrize("question, gold, restated, computed", COPIES)
def test_restating_a_formula_of_the_question_is_no_answer(question, gold, restated, computed):
    for block, right in ((restated, False), (computed, True)):
        answers = [rf"\boxed{{{x}}}" for x in block.split(" | ") if x]
        golds = [gold] * len(answers)
        assert grade(answers, golds, "math") == [True] * len(answers)
        assert grade(answers, golds, "math", [question] * len(answers)) == [right] * len(answers)


def test_what_the_question_asks_for_may_stand_in_front():
    asked = {"What is $x + y$?": True, "What is $x$, if $x - y = 3$?": False}
    for question, right in asked.items():
        assert grade([r"\boxed{x+y = 17}"], ["17"], "math", [question]) == [right]
    began = time.process_time()
    assert not answers_match("1," * 20_000 + "=5", "5", "math", "What is $x + y$?")
    assert time.process_time() - began < 1


@pytest.mark.skipif(not FAULTS.exists(), reason="no ../shared/faults: the pairs are not here")
def test_pairs_found_by_trying():
    wrong = []
    for line in FAULTS.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        task = "arc" if pair["kind"] == "arc" else "math"
        if pair["kind"] == "math":
            verdict = answers_match(pair["answer"], pair["reference"], task)
        else:
            question = pair.get("question", "")
            (verdict,) = grade([pair["answer"]], [pair["reference"]], task, [question])
        if verdict != pair["equal"]:
            wrong.append(pair)
    assert not wrong


@pytest.mark.parametrize(
    "piece", [" ", "\n", "*", "answer is ", "#### ", "$", "(", "1", "B, ", "{"]
)
@pytest.mark.parametrize("start", ["answer is", "####", r"\boxed", "Answer: (A)", ""])
def test_extraction_is_linear(start, piece):
    text = start + piece * (30_000 // len(piece))
    began = time.process_time()
    for task in ("math", "arc", "gsm8k"):
        extract_answer(text, task)
    assert time.process_time() - began < 1  # a pattern that backtracks takes a minute
