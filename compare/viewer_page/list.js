// ---------------------------------------------------------------- the list
// Only the rows in sight are elements; the box is as high as all of them.

const ROW = 58;  // pixels, as in style.css
let chosen = -1;  // the episode that is open

function drawSort() {
  const menu = h('select', {'aria-label': 'Sort by', id: 'sort', onchange: (event) => { order.by = event.target.value; refresh(); }},
    Object.entries(ORDERS).map(([name, [label]]) => h('option', {value: name, selected: name === order.by}, label)));
  fill($('sort-row'), h('label', {}, 'Sort by ', menu), h('button', {
    type: 'button', id: 'direction', 'aria-label': order.down ? 'Descending; change to ascending' : 'Ascending; change to descending',
    onclick: () => { order.down = !order.down; refresh(); },
  }, order.down ? '↓' : '↑'));
}

const drawnRows = new Map();  // place in the list -> element
let isScrolling = false;

function drawList() {
  drawnRows.clear();
  $('rows').replaceChildren();
  $('rows').style.height = `${shown.length * ROW}px`;
  if (!shown.length) $('rows').append(h('p', {class: 'empty'}, 'No episode passes these filters.'));
  drawRows();
}

// Draws what has come into sight, and takes away what has left it.
function drawRows() {
  const list = $('list'), rows = $('rows');
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
  for (const [place, element] of drawnRows) {
    if (place >= first && place < last) continue;
    element.remove();
    drawnRows.delete(place);
  }
  // from below, so that each new row finds the one that it stands before
  for (let place = last - 1; place >= first; place--) {
    if (!drawnRows.has(place)) {
      drawnRows.set(place, row(place));
      rows.insertBefore(drawnRows.get(place), drawnRows.get(place + 1) || null);
    }
    drawnRows.get(place).setAttribute('aria-selected', String(shown[place] === chosen));
  }
  list.setAttribute('aria-activedescendant', rows.querySelector('[aria-selected="true"]')?.id || '');
}

// Once a frame, however often the list says that it moved.
function onScroll() {
  if (isScrolling) return;
  isScrolling = true;
  requestAnimationFrame(() => {
    isScrolling = false;
    drawRows();
  });
}

function row(place) {
  const i = shown[place], answer = answerOf(i);
  return h('div', {
    class: 'row', role: 'option', id: `row-${i}`, data: {episode: i}, style: {top: `${place * ROW}px`},
    title: plain(index.questions[column.question[i]].id), 'aria-posinset': place + 1, 'aria-setsize': shown.length,
  },
  drawThumb(i), badge(i),
  h('div', {class: 'what'},
    h('div', {class: 'question'}, questionText(i)),
    h('div', {class: 'facts'}, armDot(i), `${runName(i)} · ${column.is_training[i] ? 'train ' : ''}step ${column.step[i]} · `,
      `${column.calls[i]} call${column.calls[i] === 1 ? '' : 's'} · `,
      answer === null ? h('em', {}, stopOf(i) || 'no answer') : `“${answer}”`)),
  h('div', {class: 'reward'}, decimal(column.reward[i]), column.marks[i] ? h('span', {class: 'flag', title: markWords(column.marks[i])}, '!') : null));
}

function drawThumb(i) {
  if (!index.hasPictures) return null;
  const source = column.picture[i] === null ? null : pictureSource(column.picture[i]);
  return source ? h('img', {class: 'thumb', src: source, alt: ''}) : h('span', {class: 'thumb'});
}

function markWords(marks) {
  return ['model', 'infrastructure', 'fatal', 'masked', 'unread'].filter((name) => FAULTS[name](marks))
    .map((name) => FAULT_WORDS[name]).join(', ');
}

function scrollToChosen() {
  const place = shown.indexOf(chosen), list = $('list');
  if (place < 0) return;
  const top = place * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}

// The neighbour in the list; where the open episode is not in it, its first or last row.
function neighbour(by) {
  if (!shown.length) return -1;
  const place = shown.indexOf(chosen);
  if (place < 0) return by > 0 ? shown[0] : shown[shown.length - 1];
  return shown[Math.min(shown.length - 1, Math.max(0, place + by))];
}
