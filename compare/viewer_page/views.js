// ---------------------------------------------------------------- the three views
// one: an episode; side: two of them; time: one question at every evaluation.

const MODES = {one: 'Episode', side: 'Side by side', time: 'Over training'};
const state = {mode: 'one', other: -1, pane: 'a'};
let isFolded = false;
let drawing = 0;  // counts drawings: one that was overtaken is dropped

async function drawView() {
  const mine = ++drawing, view = $('view');
  if (chosen < 0) {
    fill(view, h('p', {class: 'empty'}, 'Choose an episode in the list.'));
    return;
  }
  const content = await {one: viewOne, side: viewSide, time: viewTime}[state.mode]();
  if (mine !== drawing) return;
  const at = view.dataset.key === viewKey() ? view.scrollTop : 0;
  fill(view, content);
  view.dataset.key = viewKey();
  view.dataset.mode = state.mode;
  view.dataset.address = address();  // what is drawn; the page's own address may be ahead of it
  view.scrollTop = at;
  highlight();
}

// Views with one key keep their place when they are drawn again.
const viewKey = () => `${state.mode} ${column.question[chosen]}`;

function heading(i, level = 'h2') {
  return h('div', {class: 'heading'}, badge(i), h(level, {}, questionText(i)));
}

// ---------------------------------------------------------------- one

async function viewOne() {
  const ep = await episode(chosen);
  return [heading(chosen), drawFacts(chosen), drawStepper(chosen, (k) => open(k)), drawScaleFor([ep]), drawEpisode(ep)];
}

// The same question and run at its other steps.
function drawStepper(i, go) {
  const steps = ofRun(i, column.run[i]);
  if (steps.length < 2) return null;
  const place = steps.indexOf(i);
  const menu = h('select', {'aria-label': 'Step', onchange: (event) => go(+event.target.value)},
    steps.map((k) => h('option', {value: k, selected: k === i}, stepWords(k))));
  return h('p', {class: 'stepper'},
    h('button', {type: 'button', disabled: place === 0, 'aria-label': 'Earlier step', onclick: () => go(steps[place - 1])}, '←'),
    menu,
    h('button', {type: 'button', disabled: place === steps.length - 1, 'aria-label': 'Later step', onclick: () => go(steps[place + 1])}, '→'),
    h('span', {class: 'quiet'}, 'this question at other steps of this run'));
}

function stepWords(k) {
  const copy = copyOf(k);
  return `step ${column.step[k]} ${SYMBOLS[result(k)]}${copy ? ` (${copy + 1})` : ''}`;
}

function drawScaleFor(episodes) {
  return episodes.some((ep) => ep.turns.some((turn) => turn.pieces)) ? drawScale()
    : h('p', {class: 'scale'}, 'The log-probs of single tokens were not recorded; each turn has their sum.');
}

// ---------------------------------------------------------------- side by side

// Another run at the same step; where there is one run, another step of it.
function partner(i) {
  const run = column.run[i], before = state.other < 0 ? run : column.run[state.other];
  const kept = before === run ? null : nearest(i, before);
  if (kept !== null) return kept;
  for (let other = 0; other < index.runs.length; other++) {
    const k = other === run ? null : nearest(i, other);
    if (k !== null) return k;
  }
  const steps = ofRun(i, run);
  return steps.find((k) => k !== i) ?? i;
}

async function viewSide() {
  if (state.other < 0) state.other = partner(chosen);
  const [one, other] = [await episode(chosen), await episode(state.other)];
  const isSame = column.question[chosen] === column.question[state.other];
  const differ = changes(one, other);
  return [
    isSame ? h('div', {class: 'heading'}, h('h2', {}, questionText(chosen))) : h('div', {class: 'heading'}, h('h2', {}, 'Two questions')),
    chosen === state.other ? h('p', {class: 'differ'}, 'No other episode of this question; choose one in the list.')
      : isSame ? h('p', {class: 'differ'}, differ.length ? ['They differ in ', h('b', {}, differ.join(', ')), '.'] : 'Same answer, reward, searches and end.') : null,
    drawScaleFor([one, other]),
    isSame ? drawQuestion(one) : null,
    h('div', {class: 'panes'}, drawPane('a', one, isSame), drawPane('b', other, isSame)),
  ];
}

function drawPane(name, ep, isSame) {
  const i = ep.number, runs = index.runs.map((_, run) => [run, nearest(i, run)]).filter(([, k]) => k !== null);
  const go = (k) => openPane(name, k);
  const menu = h('select', {'aria-label': 'Run', onchange: (event) => go(+event.target.value)},
    runs.map(([run, k]) => h('option', {value: run === column.run[i] ? i : k, selected: run === column.run[i]}, plain(index.runs[run].name))));
  const isTarget = state.pane === name;
  return h('section', {class: `pane${isTarget ? ' target' : ''}`, 'aria-label': name === 'a' ? 'Left' : 'Right', data: {pane: name}},
    h('div', {class: 'pane-head'}, armDot(i), menu,
      h('button', {
        type: 'button', class: 'pick', 'aria-pressed': String(isTarget), title: 'a click in the list opens the episode in this pane',
        onclick: () => { state.pane = name; drawView(); },
      }, isTarget ? 'list opens here' : 'open here')),
    drawStepper(i, go),
    isSame ? drawVerdict(ep) : [heading(i, 'h3'), drawFacts(i)],
    drawEpisode(ep, {isBare: isSame}));
}

function drawVerdict(ep) {
  return h('div', {class: 'heading'}, badge(ep.number), h('h3', {}, ep.answer === null ? `no answer (${stopOf(ep.number)})` : ep.answer),
    h('span', {class: 'quiet'}, decimal(column.reward[ep.number])));
}

function openPane(name, i) {
  if (name === 'a') open(i, {quiet: true});
  else {
    state.other = i;
    remember(true);
    drawView();
  }
}

// ---------------------------------------------------------------- over training

async function viewTime() {
  const same = siblings(chosen);
  const episodes = new Map();
  for (const k of same) episodes.set(k, await episode(k));
  const changed = new Map(), before = new Map(), last = new Map();
  for (const k of same) {
    const earlier = last.get(column.run[k]);
    if (earlier !== undefined && column.step[earlier] !== column.step[k]) {
      before.set(k, earlier);
      changed.set(k, changes(episodes.get(earlier), episodes.get(k)));
    }
    last.set(column.run[k], k);
  }
  const ep = episodes.get(chosen);
  const earlier = before.has(chosen) ? episodes.get(before.get(chosen)) : null;
  return [
    heading(chosen), drawFacts(chosen),
    ep.answers.length ? h('p', {class: 'expected'}, 'Right: ', h('q', {}, ep.answers[0])) : null,
    drawStrips(same, episodes, changed),
    drawVisits(ofRun(chosen, column.run[chosen]), episodes, changed),
    drawStepper(chosen, (k) => open(k)),
    drawScaleFor([ep]),
    drawEpisode(ep, {before: earlier}),
  ];
}

function drawStrips(same, episodes, changed) {
  const steps = [...new Set(same.map((k) => column.step[k]))].sort((a, b) => a - b);
  const runs = [...new Set(same.map((k) => column.run[k]))];
  const labelled = Math.ceil(steps.length / 24);
  const at = new Map();
  for (const k of same) if (!at.has(`${column.run[k]} ${column.step[k]}`)) at.set(`${column.run[k]} ${column.step[k]}`, k);
  const cell = (run, step) => {
    const k = at.get(`${run} ${step}`);
    if (k === undefined) return h('td', {});
    const news = changed.get(k) || [], answer = answerOf(k);
    const words = `${index.runs[run].name}, step ${step}: ${result(k)}, reward ${decimal(column.reward[k])}, `
      + `${answer === null ? `no answer (${stopOf(k)})` : `answer ${answer}`}${news.length ? `, changed: ${news.join(', ')}` : ''}`;
    return h('td', {}, h('button', {
      type: 'button', class: `visit ${result(k)}${news.length ? ' news' : ''}`, title: plain(words), 'aria-label': plain(words),
      'aria-current': k === chosen ? 'true' : null, data: {visit: k}, onclick: () => open(k, {quiet: true}),
    }, SYMBOLS[result(k)]));
  };
  return h('div', {class: 'strips', tabindex: 0, role: 'group', 'aria-label': 'Every evaluation of this question'}, h('table', {},
    h('thead', {}, h('tr', {}, h('th', {scope: 'col'}, 'step'), steps.map((step, n) => h('th', {scope: 'col'}, n % labelled ? '' : String(step))))),
    h('tbody', {}, runs.map((run) => h('tr', {}, h('th', {scope: 'row'}, dot(index.arms[index.runs[run].arm].colour), index.runs[run].name),
      steps.map((step) => cell(run, step)))))),
  h('p', {class: 'legend'}, h('span', {}, '✓ right'), h('span', {}, '✗ wrong'), h('span', {}, '– not scored'),
    h('span', {}, h('i', {class: 'news-bar', 'aria-hidden': 'true'}), 'answer, reward, searches or end changed since the evaluation before')));
}

// The table of `obm follow`.
function drawVisits(visits, episodes, changed) {
  if (visits.length < 2) return null;
  return h('details', {class: 'visits', open: isVisitsOpen, ontoggle: (event) => { isVisitsOpen = event.target.open; }},
    h('summary', {}, `Every step of ${runName(visits[0])}`),
    h('div', {class: 'scroll'}, h('table', {}, h('thead', {}, h('tr', {}, ['step', '', 'reward', 'answer', 'changed', 'searches'].map((name) => h('th', {scope: 'col'}, name)))),
      h('tbody', {}, visits.map((k) => h('tr', {'aria-current': k === chosen ? 'true' : null},
        h('td', {}, h('button', {type: 'button', class: 'link', onclick: () => open(k, {quiet: true})}, column.step[k])), h('td', {}, badge(k)),
        h('td', {}, decimal(column.reward[k])), h('td', {}, episodes.get(k).answer ?? `(${stopOf(k)})`),
        h('td', {}, (changed.get(k) || []).join(', ')), h('td', {}, episodes.get(k).searches.join(' | '))))))));
}
let isVisitsOpen = true;
